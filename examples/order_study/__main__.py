"""Run the command line: `python -m examples.order_study`, in the root of a clone."""

from examples.order_study.cli import main

if __name__ == "__main__":  # a process of `parallel` imports this module, and is not to start the study again
    main(prog_name="order_study")
