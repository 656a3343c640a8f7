"""DeepSpeed, ranks and checkpoints. Whoever imports one of its modules comes by here first, before deepspeed."""

from pipeline.engine.quiet import silence_import

silence_import()
