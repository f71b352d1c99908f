"""Every error and warning of lora_plugins, in one tree.

::

    LoraPluginsError
    ├── PluginError
    │   ├── BrokenBuiltin
    │   ├── ArchitectureConflict
    │   ├── FormatConflict
    │   ├── QuantizerConflict
    │   └── ServerConflict
    ├── TargetError (ValueError)
    │   ├── UnknownScope
    │   ├── UnmatchedTargets
    │   ├── ForbiddenTargets
    │   ├── NoTargets
    │   └── UnevenCoverage
    ├── QuantizationError
    │   ├── UnknownQuantizer (ValueError)
    │   ├── QuantizerUnavailable
    │   ├── QuantizerSelfTestFailed
    │   ├── NothingQuantized
    │   ├── UnknownLayer
    │   ├── UntrainableFormat (ValueError)
    │   └── UnsupportedInitialization (ValueError)
    ├── PreparationError
    │   ├── UnknownArgument (TypeError)
    │   ├── UnknownCheck (ValueError)
    │   ├── UnsupportedPacking
    │   ├── UnsupportedTraining
    │   ├── UnloadableAdapter
    │   └── AdapterMismatch (ValueError)
    ├── AttachError
    │   ├── TrainerNotFound
    │   └── OptimizerConflict
    ├── LivenessError
    │   ├── NothingTrainable
    │   ├── OptimizerMismatch
    │   ├── FrozenHead
    │   ├── ModelReplaced
    │   ├── AdapterNotMoving
    │   ├── NonFiniteLoss
    │   ├── DeadLoss
    │   ├── BrokenCheckpoint
    │   ├── ResumeConflict
    │   ├── UnsavedTensors
    │   └── ProcessMissing
    ├── TrainingError
    │   ├── ArgumentsError (ValueError)
    │   ├── DataError (ValueError)
    │   ├── TemplateError (ValueError)
    │   ├── ResumeError
    │   └── ReproductionError
    ├── MergeError
    ├── ServingError
    │   ├── ExportError
    │   ├── InvalidServingSetting (ValueError)
    │   ├── RefusedAdapter (ValueError)
    │   ├── UnknownServer (ValueError)
    │   └── UnsupportedExport (ValueError)
    ├── TrialError
    ├── PlanError (ValueError)
    ├── ReportError
    └── DemoError

    LoraPluginsWarning (UserWarning)
    ├── PluginWarning
    ├── TargetWarning
    ├── PreparationWarning
    ├── LivenessWarning
    └── ServingWarning
"""

from __future__ import annotations

__all__ = [
    "AdapterMismatch",
    "AdapterNotMoving",
    "ArchitectureConflict",
    "ArgumentsError",
    "AttachError",
    "BrokenBuiltin",
    "BrokenCheckpoint",
    "DataError",
    "DeadLoss",
    "DemoError",
    "ExportError",
    "ForbiddenTargets",
    "FormatConflict",
    "FrozenHead",
    "InvalidServingSetting",
    "LivenessError",
    "LivenessWarning",
    "LoraPluginsError",
    "LoraPluginsWarning",
    "MergeError",
    "ModelReplaced",
    "NoTargets",
    "NonFiniteLoss",
    "NothingQuantized",
    "NothingTrainable",
    "OptimizerConflict",
    "OptimizerMismatch",
    "PlanError",
    "PluginError",
    "PluginWarning",
    "PreparationError",
    "PreparationWarning",
    "ProcessMissing",
    "QuantizationError",
    "QuantizerConflict",
    "QuantizerSelfTestFailed",
    "QuantizerUnavailable",
    "RefusedAdapter",
    "ResumeConflict",
    "ResumeError",
    "ServerConflict",
    "ServingError",
    "ServingWarning",
    "TargetError",
    "TargetWarning",
    "TemplateError",
    "TrainerNotFound",
    "TrainingError",
    "TrialError",
    "UnevenCoverage",
    "UnknownArgument",
    "UnknownCheck",
    "UnknownLayer",
    "UnknownQuantizer",
    "UnknownScope",
    "UnknownServer",
    "UnloadableAdapter",
    "UnmatchedTargets",
    "UnsavedTensors",
    "UnsupportedExport",
    "UnsupportedInitialization",
    "UnsupportedPacking",
    "UnsupportedTraining",
    "UntrainableFormat",
]


class LoraPluginsError(Exception):
    """Root of all errors that lora_plugins raises on purpose."""

    #: A command shows the message alone, in one line and without a traceback.
    says_it_all = True


class PluginError(LoraPluginsError):
    """Something is wrong with a plugin or with two of them together."""


class BrokenBuiltin(PluginError):
    """A plugin that lora-plugins itself ships does not load: the installation is damaged."""


class ArchitectureConflict(PluginError):
    """Two third-party plugins register the same ``model_type``."""


class FormatConflict(PluginError):
    """Two third-party plugins describe a storage format of the same ``quant_method``."""


class QuantizerConflict(PluginError):
    """Two third-party plugins register a quantization backend of the same name."""


class ServerConflict(PluginError):
    """Two third-party plugins register the same server."""


class TargetError(LoraPluginsError, ValueError):
    """The modules that should get adapters cannot be determined, or are not there."""


class UnknownScope(TargetError):
    """``target_modules`` names a scope that the architecture does not have."""


class UnmatchedTargets(TargetError):
    """At least one requested target name matches no module of the model."""


class ForbiddenTargets(TargetError):
    """A requested name means only modules that must not get an adapter: it would do nothing, or break the model."""


class NoTargets(TargetError):
    """Nothing in the model can take an adapter."""


class UnevenCoverage(TargetError):
    """The targets reach some of the repeated blocks of one kind and miss others."""


class QuantizationError(LoraPluginsError):
    """The base model cannot be quantized as asked."""


class UnknownQuantizer(QuantizationError, ValueError):
    """No plugin registers a quantization backend of that name."""


class QuantizerUnavailable(QuantizationError):
    """The backend is registered and cannot run here; the message has the reason and the install line."""


class QuantizerSelfTestFailed(QuantizationError):
    """The backend failed the small training run that every backend must pass before it is trusted."""


class NothingQuantized(QuantizationError):
    """The walk over the model found no linear layer to quantize."""


class UnknownLayer(QuantizationError):
    """A linear layer is stored in a way that no quantization backend here knows."""


class UntrainableFormat(QuantizationError, ValueError):
    """The base is stored in a format that no adapter was ever trained on here; ``allow_format`` insists."""


class UnsupportedInitialization(QuantizationError, ValueError):
    """The LoRA initialisation needs float weights and the base model is already quantized."""


class PreparationError(LoraPluginsError):
    """The model cannot be prepared for training."""


class UnknownArgument(PreparationError, TypeError):
    """A keyword is neither ours nor a field of ``peft.LoraConfig``."""


class UnknownCheck(PreparationError, ValueError):
    """``skip_checks`` names a check that does not exist."""


class UnsupportedPacking(PreparationError):
    """A model cannot keep the examples of one row apart."""


class UnsupportedTraining(PreparationError):
    """An option of the Trainer cannot be combined with the adapters as they were asked for."""


class UnloadableAdapter(PreparationError):
    """The adapter could be trained and saved, and PEFT would not find its tensors on loading."""


class AdapterMismatch(PreparationError, ValueError):
    """A stored adapter does not fit the model it should be continued on."""


class AttachError(LoraPluginsError):
    """The adapters cannot be put into this Trainer."""


class TrainerNotFound(AttachError):
    """The callback cannot find the Trainer that it belongs to; ``attach(trainer, …)`` is the way out."""


class OptimizerConflict(AttachError):
    """The Trainer's optimizer cannot be changed to the adapter's parameters."""


class LivenessError(LoraPluginsError):
    """The run would finish green and has trained nothing, or not what was asked."""


class NothingTrainable(LivenessError):
    """No parameter requires a gradient."""


class OptimizerMismatch(LivenessError):
    """The optimizer misses a trainable tensor or holds a frozen one."""


class FrozenHead(LivenessError):
    """A head that was made for the task is frozen, so it would stay random."""


class ModelReplaced(LivenessError):
    """The model in the Trainer is not the one that got the adapters."""


class AdapterNotMoving(LivenessError):
    """Adapter weights did not change with the first steps that could change them."""


class NonFiniteLoss(LivenessError):
    """The loss is NaN or infinite."""


class DeadLoss(LivenessError):
    """The loss and every gradient are exactly zero."""


class BrokenCheckpoint(LivenessError):
    """A checkpoint was written without a usable adapter in it, or the best one was not restored."""


class ResumeConflict(LivenessError):
    """The run that resumes differs from the one that wrote the checkpoint."""


class UnsavedTensors(LivenessError):
    """Tensors that are trained are in none of the adapter files."""


class ProcessMissing(LivenessError):
    """One process of a distributed run does alone what all of them must do, and would wait for ever."""


class TrainingError(LoraPluginsError):
    """The command ``train`` cannot do what it was asked."""


class ArgumentsError(TrainingError, ValueError):
    """An argument is unknown, misspelt, has a wrong value, or contradicts another one.

    On the command line it is an error of usage, which ends the program with exit code 2 instead of 1.
    """

    exit_code = 2


class DataError(TrainingError, ValueError):
    """The data set cannot be found, read, or turned into training examples."""


class TemplateError(TrainingError, ValueError):
    """A prompt template or chat template does not fit the data set."""


class ResumeError(TrainingError):
    """The run in the output folder cannot be continued as asked."""


class ReproductionError(TrainingError):
    """A run cannot be repeated: it is not recorded, asks for too much, or something that it needs is not here."""


class MergeError(LoraPluginsError):
    """An adapter cannot be merged into its base model."""


class ServingError(LoraPluginsError):
    """An adapter cannot be brought to a server."""


class ExportError(ServingError):
    """An adapter cannot be written in a server's format: a file is missing, in the way, or a setting is."""


class InvalidServingSetting(ServingError, ValueError):
    """A variable that configures the plugin of a server has a value that it cannot have."""


class RefusedAdapter(ServingError, ValueError):
    """A server that asks the registry may not, or must not, serve an adapter."""


class UnknownServer(ServingError, ValueError):
    """No plugin registers a server under this name."""


class UnsupportedExport(ServingError, ValueError):
    """The format or its server has no place for something that the adapter has."""


class TrialError(LoraPluginsError):
    """An adapter cannot be tried: its base does not write text, or has no tokenizer."""


class PlanError(LoraPluginsError, ValueError):
    """What a run would take cannot be worked out: the model is unknown, or an argument has no meaning."""


class ReportError(LoraPluginsError):
    """There is no run or adapter to write a report page of, or it cannot be written."""


class DemoError(LoraPluginsError):
    """The demo lacks something, or what it shows did not hold."""


class LoraPluginsWarning(UserWarning):
    """Root of all warnings of lora_plugins."""

    #: A command shows the message alone, without the line of code that warned.
    says_it_all = True


class PluginWarning(LoraPluginsWarning):
    """A third-party plugin is disabled."""


class TargetWarning(LoraPluginsWarning):
    """Something about the targets is unusual, and ``strict=False`` lets it pass."""


class PreparationWarning(LoraPluginsWarning):
    """The model was prepared differently from what was asked, for the reason given."""


class LivenessWarning(LoraPluginsWarning):
    """A run ended and nothing could have been trained, without anything being broken."""


class ServingWarning(LoraPluginsWarning):
    """A server that was named will not take the adapter."""
