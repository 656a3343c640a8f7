"""What is silenced, and that nothing else is."""

import logging

from pipeline.engine.quiet import silence_import, silence_load_report, silent_meeting


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


def test_the_table_of_a_new_head_is_left_out_and_that_of_other_shapes_is_not():
    silence_load_report()
    logger = logging.getLogger("transformers.modeling_utils")

    def told(text: str) -> bool:
        return bool(logger.filter(logger.makeRecord(logger.name, logging.WARNING, "", 0, text, (), None)))

    assert not told("BertForSequenceClassification LOAD REPORT from: x\nclassifier.weight | MISSING |")
    assert told("LOAD REPORT from: x\nclassifier.weight | MISMATCH | ")
    assert told("something else")
