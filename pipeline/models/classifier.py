"""A model with a classification head, as transformers makes it of the weights of another."""

from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig

from pipeline.config.answers import Answers
from pipeline.config.paths import pretrained
from pipeline.config.schema import ModelConfig


def kind_of(answers: Answers | None) -> Any:
    """transformers' class for the task."""
    return AutoModelForSequenceClassification if answers else AutoModelForCausalLM


def classifying(config: ModelConfig, answers: Answers | None) -> dict[str, Any]:
    """What `from_pretrained` has to be told besides."""
    if answers is None:
        return {}
    name, options = pretrained(config.name_or_path)
    return {"config": with_answers(AutoConfig.from_pretrained(name, **options), answers)}


def with_answers(settings: PreTrainedConfig, answers: Answers) -> PreTrainedConfig:
    """The model's config, with the task's labels and its padding, behind which GPT-style models answer. Raises
    ValueError for an encoder with a decoder, and where its weights have a head for other labels."""
    if settings.is_encoder_decoder:
        raise ValueError("it is an encoder with a decoder; give an encoder or a GPT-style model to classify texts with")
    own = list((settings.id2label or {}).values())
    trained = any(name.endswith("ForSequenceClassification") for name in settings.architectures or ())
    if trained and own != answers.classes and own != [f"LABEL_{index}" for index in range(len(answers.classes))]:
        raise ValueError(
            f"its classification head answers {', '.join(map(str, own[:6]))}, and the labels are "
            f"{', '.join(answers.classes[:6])}: give a model of the same labels in the same order, or one without such "
            "a head"
        )
    settings.id2label = dict(enumerate(answers.classes))
    settings.label2id = {label: index for index, label in enumerate(answers.classes)}
    for part in (settings, settings.get_text_config()):
        part.pad_token_id = answers.padding
    return settings


def is_of_head(name: str, prefix: str) -> bool:
    """Whether a weight is not of the body, named `prefix`, but of what answers on top of it, and so is made anew."""
    return not name.startswith(f"{prefix}.") or ".pooler." in name
