"""`python -m onnxpress`."""

from onnxpress.cli import main

if __name__ == "__main__":
    main()
