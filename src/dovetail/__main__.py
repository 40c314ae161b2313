"""`python -m dovetail` is the command `dovetail`, also where no script of that name is on the path."""

from dovetail.cli.main import main

if __name__ == "__main__":
    main()
