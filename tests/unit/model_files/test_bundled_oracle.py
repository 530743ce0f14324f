"""The bundled model as we convert it, against transformers' own reading of the same GGUF."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from disaggregated.model_files import resolve
from disaggregated.model_files.bundled import SMOLLM2
from disaggregated.model_files.bundled_fetch import gguf_of
from disaggregated.model_files.cache_folder import cache_folder


@pytest.mark.soak
def test_every_tensor_equals_what_transformers_reads(tmp_path: Path) -> None:
    pytest.importorskip("accelerate", reason="transformers reads GGUF only with accelerate installed")
    source = gguf_of(SMOLLM2, cache_folder(), lambda line: None)
    (tmp_path / source.name).symlink_to(source)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=source.name, dtype=torch.float32)
    ours = transformers.AutoModelForCausalLM.from_pretrained(resolve("smollm2-135m-instruct").path)
    expected, found = theirs.state_dict(), ours.state_dict()
    assert set(expected) == set(found)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    for key in ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "eos_token_id", "head_dim"):
        assert getattr(theirs.config, key) == pytest.approx(getattr(ours.config, key)), key
