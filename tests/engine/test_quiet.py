"""What is silenced, and that nothing else is."""

import logging

from pipeline.engine.quiet import silence_import, silent_meeting


def test_only_the_line_of_that_name_is_left_out(capsys):
    with silent_meeting():
        print("before")
        print("DeepSpeed deepspeed.ops.comm.x built successfully")
        print("")
        print("after", end="")
        print()
    assert capsys.readouterr().out == "before\n\nafter\n"


def test_only_the_warning_of_that_name_is_left_out():
    silence_import()
    logger = logging.getLogger("DeepSpeed")

    def told(text: str) -> bool:
        record = logger.makeRecord("DeepSpeed", logging.WARNING, "", 0, text, (), None)
        return bool(logger.filter(record))

    assert not told("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    assert told("Setting accelerator to CUDA")
