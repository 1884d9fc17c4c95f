"""`python -m imagekiln`, and so `torchrun -m imagekiln`, is the command line."""

from imagekiln.cli.main import main

if __name__ == "__main__":
    main()
