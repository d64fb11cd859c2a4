"""The program `joyjax`, also as `python -m joyjax`."""


def main() -> None:
    """Run the program. Streams, Ctrl-C and collector are set up first, since the other imports are slow."""
    from joyjax.commands.streams import repair_streams

    repair_streams()
    from joyjax.commands.cancel import end_on_interrupt

    end_on_interrupt()
    from joyjax.commands.collector import quiet

    quiet()
    from joyjax.cli import main as run

    run()


if __name__ == "__main__":
    main()
