"""`python -m bathyscope.cli`."""

from bathyscope.cli import main

if __name__ == "__main__":
    main()
