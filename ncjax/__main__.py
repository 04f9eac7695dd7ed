"""`python -m ncjax`: the command `ncjax`."""

from ncjax.command import console

if __name__ == "__main__":
    console()
