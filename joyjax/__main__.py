"""The program `joyjax`, also as `python -m joyjax`."""


def main() -> None:
    """Run the program. Streams and Ctrl-C come first: what follows takes a moment to import."""
    from joyjax.commands.streams import mend_streams

    mend_streams()
    from joyjax.commands.cancel import end_on_interrupt

    end_on_interrupt()
    from joyjax.cli import main as run

    run()


if __name__ == "__main__":
    main()
