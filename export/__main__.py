"""`python -m export` opens the command line, which sits on top of the libraries."""

from onnxpress.cli import export_main

if __name__ == "__main__":
    export_main()
