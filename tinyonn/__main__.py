"""`python -m tinyonn`: the same command."""

from .cli import main

if __name__ == "__main__":
    main()
