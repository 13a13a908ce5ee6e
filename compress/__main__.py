"""`python -m compress` opens the command line, which sits on top of the libraries."""

from onnxpress.cli import compress_main

if __name__ == "__main__":
    compress_main()
