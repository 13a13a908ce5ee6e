"""Run by another Python that has optimum-onnx: open a bundle with a client, print what it gives.

    python run_client.py CLIENT BUNDLE REQUEST.json   →   one JSON document on stdout

Nothing of ours is imported: the bundle must be enough.
"""

import json
import sys
from pathlib import Path

import torch


def features(bundle: str, request: dict) -> list:
    from optimum.onnxruntime import ORTModelForFeatureExtraction

    model = ORTModelForFeatureExtraction.from_pretrained(bundle)
    return model(**_tensors(request)).last_hidden_state.tolist()


def classes(bundle: str, request: dict) -> list:
    from optimum.onnxruntime import ORTModelForSequenceClassification

    model = ORTModelForSequenceClassification.from_pretrained(bundle)
    return model(**_tensors(request)).logits.tolist()


def continuation(bundle: str, request: dict) -> list:
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(bundle)
    return _generate(model, request)


def translation(bundle: str, request: dict) -> list:
    from optimum.onnxruntime import ORTModelForSeq2SeqLM

    model = ORTModelForSeq2SeqLM.from_pretrained(bundle)
    return _generate(model, request)


def sentences(bundle: str, request: dict) -> list:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(bundle, backend="onnx").encode(request["texts"]).tolist()


def _generate(model: object, request: dict) -> list:
    new = request.pop("new")
    made = model.generate(
        **_tensors(request), max_new_tokens=new, min_new_tokens=new, do_sample=False, num_beams=1
    )
    return made.tolist()


def _tensors(request: dict) -> dict:
    return {name: torch.tensor(value) for name, value in request.items()}


if __name__ == "__main__":
    client, bundle, request = sys.argv[1:]
    with Path(request).open() as file:
        answer = globals()[client](bundle, json.load(file))
    print("\n" + json.dumps(answer))
