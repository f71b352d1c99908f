"""Configurations of adapters as people publish them: pushed, pulled, checked and loaded, or refused for a reason."""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from adapters import pulled
from peft import LoraConfig, get_peft_model
from versions import needs

from registry import check_contract
from registry.errors import BaseMismatch, UnsafeFile
from registry.testing import LoopbackHub

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))

import small_models
from small_models import Case

DATA = Path(__file__).parent / "data"
CONFIGS = json.loads((DATA / "wild-configs.json").read_text())
#: Made up in the same styles: other architectures and heads, and fields that none of those found has.
INVENTED = json.loads((DATA / "invented-configs.json").read_text())

#: Architecture as the list names it -> type and class in transformers.
CLASSES = {
    "bart": ("bart", "BartForConditionalGeneration"),
    "beit": ("beit", "BeitForImageClassification"),
    "bertmlm": ("bert", "BertForMaskedLM"),
    "bertqa": ("bert", "BertForQuestionAnswering"),
    "bge": ("bert", "BertModel"),
    "bloom": ("bloom", "BloomForCausalLM"),
    "cohere": ("cohere", "CohereForCausalLM"),
    "convnext": ("convnext", "ConvNextForImageClassification"),
    "debertacls": ("deberta-v2", "DebertaV2ForSequenceClassification"),
    "deepseekv3": ("deepseek_v3", "DeepseekV3ForCausalLM"),
    "falcon": ("falcon", "FalconForCausalLM"),
    "gemma": ("gemma", "GemmaForCausalLM"),
    "glm4": ("glm4", "Glm4ForCausalLM"),
    "gptj": ("gptj", "GPTJForCausalLM"),
    "gptoss": ("gpt_oss", "GptOssForCausalLM"),
    "granite": ("granite", "GraniteForCausalLM"),
    "idefics3": ("idefics3", "Idefics3ForConditionalGeneration"),
    "lfm2": ("lfm2", "Lfm2ForCausalLM"),
    "llamacls": ("llama", "LlamaForSequenceClassification"),
    "llavanext": ("llava_next", "LlavaNextForConditionalGeneration"),
    "mamba": ("mamba", "MambaForCausalLM"),
    "mixtral": ("mixtral", "MixtralForCausalLM"),
    "mllama": ("mllama", "MllamaForConditionalGeneration"),
    "mpt": ("mpt", "MptForCausalLM"),
    "mt5": ("mt5", "MT5ForConditionalGeneration"),
    "nllb": ("m2m_100", "M2M100ForConditionalGeneration"),
    "olmo2": ("olmo2", "Olmo2ForCausalLM"),
    "opt": ("opt", "OPTForCausalLM"),
    "paligemma": ("paligemma", "PaliGemmaForConditionalGeneration"),
    "qwen2cls": ("qwen2", "Qwen2ForSequenceClassification"),
    "qwen2moe": ("qwen2_moe", "Qwen2MoeForCausalLM"),
    "qwen2vl": ("qwen2_vl", "Qwen2VLForConditionalGeneration"),
    "qwen3moe": ("qwen3_moe", "Qwen3MoeForCausalLM"),
    "segformer": ("segformer", "SegformerForSemanticSegmentation"),
    "stablelm": ("stablelm", "StableLmForCausalLM"),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM"),
    "wav2vec2ctc": ("wav2vec2", "Wav2Vec2ForCTC"),
    "codegen": ("codegen", "CodeGenForCausalLM"),
    "gptneo": ("gpt_neo", "GPTNeoForCausalLM"),
    "xlmrtok": ("xlm-roberta", "XLMRobertaForTokenClassification"),
    "bertcls": ("bert", "BertForSequenceClassification"),
    "distilcls": ("distilbert", "DistilBertForSequenceClassification"),
    "gemma2": ("gemma2", "Gemma2ForCausalLM"),
    "gemma3": ("gemma3", "Gemma3ForConditionalGeneration"),
    "gemma4": ("gemma4", "Gemma4ForConditionalGeneration"),
    "gpt2": ("gpt2", "GPT2LMHeadModel"),
    "llama": ("llama", "LlamaForCausalLM"),
    "llamamodel": ("llama", "LlamaModel"),
    "llava": ("llava", "LlavaForConditionalGeneration"),
    "mistral": ("mistral", "MistralForCausalLM"),
    "nemotronh": ("nemotron_h", "NemotronHForCausalLM"),
    "neox": ("gpt_neox", "GPTNeoXForCausalLM"),
    "phi": ("phi", "PhiForCausalLM"),
    "phi3": ("phi3", "Phi3ForCausalLM"),
    "qwen2": ("qwen2", "Qwen2ForCausalLM"),
    "qwen25vl": ("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration"),
    "qwen3": ("qwen3", "Qwen3ForCausalLM"),
    "qwen35": ("qwen3_5", "Qwen3_5ForConditionalGeneration"),
    "qwen3vl": ("qwen3_vl", "Qwen3VLForConditionalGeneration"),
    "roberta": ("roberta", "RobertaForSequenceClassification"),
    "smolvlm": ("smolvlm", "SmolVLMForConditionalGeneration"),
    "t5": ("t5", "T5ForConditionalGeneration"),
    "vit": ("vit", "ViTForImageClassification"),
    "whisper": ("whisper", "WhisperForConditionalGeneration"),
}
#: Architectures that transformers has no class for.
FOREIGN = ("custom-glm", "custom-baichuan", "diffusers")
#: Written by another trainer, in a form of its own.
OF_OTHERS = (22,)
#: PEFT itself cannot make these adapters any more, and why.
REFUSED_BY_PEFT = {29: "No modules were targeted", 44: "incompatible with Mamba-based models"}
#: One of each kind: PEFT's record of the class, VLMs under a text task, heads, regex targets, embeddings as targets.
FAST = (3, 2, 11, 16, 17, 36, 43)

FAST_INVENTED = ("experts as parameters", "answers", "development release")
#: Fields of PEFT before 0.3, of a release that does not exist yet, and of other trainers.
OTHERS_FIELDS = (
    *("enable_lora", "merge_weights", "use_magic", "magic_config", "magic_names", "unsloth_version"),
    *("loraplus_lr_ratio", "loraplus_lr_embedding", "lora_target", "additional_target", "train_type"),
)

pytestmark = pytest.mark.filterwarnings("ignore")


@functools.cache
def base_folder(architecture: str) -> Path:
    model_type, name = CLASSES[architecture]
    task = "sequence classification" if "SequenceClassification" in name else "any"
    folder = Path(tempfile.mkdtemp(prefix=f"base-{architecture}-"))
    small_models.build(Case(task, model_type, name), "cpu").save_pretrained(folder)
    return folder


def base_of(architecture: str) -> Any:
    name = CLASSES[architecture][1]
    return getattr(transformers, name).from_pretrained(base_folder(architecture)).eval()


def trained(architecture: str, config: dict[str, Any]) -> Any:
    """A model with adapters of this configuration, as PEFT makes them, that change something."""
    known = {key: value for key, value in config.items() if key in LoraConfig.__dataclass_fields__}
    torch.manual_seed(3)
    model = get_peft_model(base_of(architecture), LoraConfig(**{**known, "auto_mapping": None}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name or "modules_to_save" in name:
                torch.nn.init.normal_(parameter, std=0.1)
    return model.eval()


def output(model: Any) -> torch.Tensor:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    with torch.no_grad():
        found = model(**small_models.inputs(base))
    return found[0] if found.get("logits") is None else found.logits


def parameters() -> Iterator[Any]:
    for number, entry in enumerate(CONFIGS):
        if entry["architecture"] not in FOREIGN and number not in (*OF_OTHERS, *REFUSED_BY_PEFT):
            marks = [] if number in FAST else [pytest.mark.slow]
            if entry["architecture"] == "qwen25vl":
                marks.append(needs("transformers", "5.23", "it cannot build the configuration of a small one"))
            yield pytest.param(number, marks=marks, id=f"{number}-{entry['architecture']}")


@pytest.mark.parametrize("number", list(parameters()))
def test_published_checked_and_loaded_with_the_logits_of_peft(
    number: int, loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    publish_check_and_load(CONFIGS[number]["architecture"], CONFIGS[number]["config"], loopback_hub, tmp_path)


def invented() -> Iterator[Any]:
    for entry in INVENTED:
        marks = () if entry["note"] in FAST_INVENTED else pytest.mark.slow
        yield pytest.param(entry, marks=marks, id=f"{entry['architecture']}: {entry['note']}")


@pytest.mark.parametrize("entry", list(invented()))
def test_what_others_may_write_is_published_checked_and_loaded_alike(
    entry: dict[str, Any], loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    known = {*LoraConfig.__dataclass_fields__, *OTHERS_FIELDS}
    if unknown := [key for key, value in entry["config"].items() if key not in known and value not in (None, False)]:
        pytest.skip(f"this PEFT does not know {', '.join(unknown)}")
    publish_check_and_load(entry["architecture"], entry["config"], loopback_hub, tmp_path)


def publish_check_and_load(
    architecture: str, config: dict[str, Any], loopback_hub: LoopbackHub, tmp_path: Path
) -> None:
    """Published from memory and from files, pulled, checked in three ways, loaded with the logits that PEFT gives."""
    model = trained(architecture, config)
    expected = output(model)
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    folder = base_folder(architecture)
    name = f"org/{architecture}"
    loopback_hub.create_repo(name)
    loopback_hub.commit(name, {file.name: file.read_bytes() for file in folder.iterdir()})
    at = {"base_hub": loopback_hub.endpoint, "token": loopback_hub.token}
    options = {"base_model": name, "allow": ["embed_tokens", "lm_head"]}
    for source, kind in ((model, "live"), (tmp_path / "folder", "files")):
        adapter = pulled(source, tmp_path / kind, **options)
        assert adapter.check(base_of(architecture)).tensors == len(adapter.manifest.tensors)
        assert adapter.check(folder).tensors == len(adapter.manifest.tensors)
        assert adapter.check(name, **at).tensors == len(adapter.manifest.tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = adapter.load(folder, trust_identity=True).eval()
        assert torch.equal(output(loaded), expected)


def test_a_configuration_of_another_trainer_is_refused_by_name(tmp_path: Path) -> None:
    config = CONFIGS[OF_OTHERS[0]]["config"]
    model = trained("llama", {"r": 8, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"})
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UnsafeFile, match="MLX wrote it"):
        pulled(tmp_path / "folder", tmp_path / "release", base_model="org/base")


@needs("peft", "0.21.2", "it refuses other configurations")
@pytest.mark.parametrize("number", REFUSED_BY_PEFT)
def test_what_peft_cannot_make_is_refused_with_its_reason(number: int, tmp_path: Path) -> None:
    architecture, config = CONFIGS[number]["architecture"], CONFIGS[number]["config"]
    target = "q_proj" if architecture == "vit" else "up_proj"
    model = trained(architecture, {**config, "target_modules": [target]})
    model.save_pretrained(tmp_path / "folder")
    (tmp_path / "folder" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(BaseMismatch, match=REFUSED_BY_PEFT[number]):
        check_contract(tmp_path / "folder", base_of(architecture))


def test_every_configuration_has_its_test() -> None:
    assert {entry["architecture"] for entry in (*CONFIGS, *INVENTED)} == {*CLASSES, *FOREIGN}
    assert len(CONFIGS) == 54
    assert len(INVENTED) == 92
    assert {*FAST_INVENTED} <= {entry["note"] for entry in INVENTED}
