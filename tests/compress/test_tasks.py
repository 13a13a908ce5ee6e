from types import SimpleNamespace

import pytest

from calib_data.errors import ConfigError, ModelError
from compress.tasks import CUSTOM, get_task, task_of


@pytest.mark.parametrize(
    ("architecture", "task"),
    [
        ("BertModel", "feature-extraction"),
        ("BertForMaskedLM", "fill-mask"),
        ("BertForSequenceClassification", "text-classification"),
        ("BertForTokenClassification", "token-classification"),
        ("BertForQuestionAnswering", "question-answering"),
        ("GPT2LMHeadModel", "text-generation"),
        ("LlamaForCausalLM", "text-generation"),
        ("T5ForConditionalGeneration", "text2text-generation"),
        ("BartForConditionalGeneration", "text2text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("ViTModel", "feature-extraction"),
        ("CLIPModel", "zero-shot-image-classification"),
        ("SiglipModel", "zero-shot-image-classification"),
        ("CLIPTextModel", "feature-extraction"),
    ],
)
def test_architecture_tells_the_task(architecture: str, task: str) -> None:
    assert task_of(SimpleNamespace(architectures=[architecture])).name == task


@pytest.mark.parametrize("architectures", [None, [], ["BertForJuggling"]])
def test_unknown_architecture_is_refused(architectures: list[str] | None) -> None:
    with pytest.raises(ModelError, match="fits no task; pass --task"):
        task_of(SimpleNamespace(architectures=architectures))


def test_names() -> None:
    assert get_task("fill-mask").auto_class == "AutoModelForMaskedLM"
    assert get_task("custom") is CUSTOM
    with pytest.raises(ConfigError, match="choose one of"):
        get_task("sorting")
