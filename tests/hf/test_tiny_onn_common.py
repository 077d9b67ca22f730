"""transformers' own common tests of models and configurations, on TinyOnn.

The wheel of transformers has no tests, its source distribution has. Run them with

    pip download --no-binary transformers --no-deps transformers==VERSION && tar xzf transformers-VERSION.tar.gz
    TRANSFORMERS_SOURCE=transformers-VERSION python -m pytest -o addopts=--import-mode=importlib tests/hf/test_tiny_onn_common.py

They also need the package `parameterized`. `NOT_APPLICABLE` names those that say nothing here, and why; `test_tiny_onn*.py` have tests of
their own in place of those and of the most important others.
"""

from __future__ import annotations

import importlib
import os
import sys
import types
import unittest
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers.models.auto.modeling_auto

from tinyonn.hf import TinyOnnConfig, TinyOnnForCausalLM, TinyOnnModel

SOURCE = os.environ.get("TRANSFORMERS_SOURCE")
if not SOURCE:
    pytest.skip("needs TRANSFORMERS_SOURCE, the folder of transformers' source distribution", allow_module_level=True)
pytest.importorskip("parameterized")

_WHOLE = "expects GradientCheckpointingLayer, which runs a whole layer again; here routing stays outside (test_tiny_onn_training.py)"
NOT_APPLICABLE = {
    "test_gradient_checkpointing_enable_disable": _WHOLE,
    "test_training_gradient_checkpointing": _WHOLE,
    "test_generation_tester_mixin_inheritance": "the source distribution has no tests of generation (test_tiny_onn_generation.py)",
    "test_torch_save_load": "calls a state dict as a function where a buffer is bool",
    "test_init_weights_can_init_buffers": "expects buffers that do not depend on random weights; thresholds fit the prototypes",
}


def common(module: str) -> Any:
    """A module of transformers' tests. Those of generation and of export, which the source distribution lacks, are left out."""
    package = types.ModuleType("transformers_tests")
    package.__path__ = [str(Path(SOURCE).resolve() / "tests")]
    stubs = {"transformers_tests": package}
    for name, mixin in (("generation.test_utils", "GenerationTesterMixin"), ("exporters.test_export", "ExportTesterMixin")):
        for part in (name.partition(".")[0], name):
            stubs[f"transformers_tests.{part}"] = types.ModuleType(f"transformers_tests.{part}")
        setattr(stubs[f"transformers_tests.{name}"], mixin, type(mixin, (), {}))
    stubs["transformers_tests.utils"] = types.ModuleType("transformers_tests.utils")
    stubs["transformers_tests.utils.test_configuration_utils"] = utils = types.ModuleType("test_configuration_utils")
    utils.config_common_kwargs = {}  # type: ignore[attr-defined]
    for name, stub in stubs.items():
        sys.modules.setdefault(name, stub)
    return importlib.import_module(f"transformers_tests.{module}")


class Sizes:
    """The model under test, as the common tests expect it."""

    is_training = True
    batch_size, seq_length, hidden_size, num_hidden_layers, num_attention_heads, vocab_size = 3, 11, 32, 2, 2, 99

    def __init__(self, attention: str) -> None:
        self.attention = attention

    def get_config(self) -> TinyOnnConfig:
        return TinyOnnConfig(
            vocab_size=self.vocab_size, hidden_size=32, head_dim=16, num_hidden_layers=2, init_num_experts=4, max_num_experts=5,
            max_position_embeddings=64, attention=self.attention, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )  # fmt: skip

    def prepare_config_and_inputs_for_common(self) -> tuple[TinyOnnConfig, dict[str, Any]]:
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class _Common(common("test_modeling_common").ModelTesterMixin):  # type: ignore[misc]
    all_model_classes = (TinyOnnModel, TinyOnnForCausalLM)
    has_attentions = False
    attention: str

    def setUp(self) -> None:
        self.model_tester = Sizes(self.attention)
        auto = transformers.models.auto.modeling_auto
        for names, kind in ((auto.MODEL_MAPPING_NAMES, TinyOnnModel), (auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, TinyOnnForCausalLM)):
            patch = mock.patch.dict(names, {TinyOnnConfig.model_type: kind.__name__})  # what the common tests ask for kinds of models
            patch.start()
            self.addCleanup(patch.stop)
        name = self._testMethodName
        for start, why in NOT_APPLICABLE.items():
            if name.startswith(start):
                self.skipTest(why)

    def test_config(self) -> None:
        with mock.patch("transformers.utils.direct_transformers_import", return_value=transformers):  # from a checkout that is not there
            tester = common("test_configuration_common").ConfigTester
        tester(self, TinyOnnConfig, common_properties=["hidden_size", "num_hidden_layers"], hidden_size=64).run_common_tests()


class TestDynNSA(_Common, unittest.TestCase):
    attention = "dyn_nsa"


class TestFull(_Common, unittest.TestCase):
    attention = "full"


class TestDynSMHA(_Common, unittest.TestCase):
    attention = "dyn_smha"
