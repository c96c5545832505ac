"""Quire's own components, registered as any plugin registers its own."""

from __future__ import annotations

from collections.abc import Callable

from quire.hooks import hookimpl

COMPONENTS: list[tuple[str, str, str | tuple[str, ...]]] = [
    ("sum.Sum", "objective", ()),
    ("checkpoint.Pretrained", "part", "pretrained"),
    ("schedule.WarmupCosine", "part", "schedule"),
    ("schedule.Constant", "part", "schedule"),
    ("datasets.crops.RandomResizedCrop", "part", "transform"),
    ("datasets.crops.RandomFlip", "part", "transform"),
    ("datasets.images.Digits", "data", ()),
    ("datasets.images.TorchvisionImages", "data", ()),
    ("datasets.folder.ImageFolder", "data", ()),
    ("datasets.npz.NpzImages", "data", ()),
    ("datasets.samples.SampleImages", "data", ()),
    ("datasets.speech.SpeechFolder", "data", ()),
    ("datasets.speech.SpeechTones", "data", ()),
    ("datasets.logmel.LogMel", "part", "frontend"),
    ("roles.tokens.vit.ViTEncoder", "encoder", "TokenEncoder"),
    ("roles.tokens.timm.TimmViT", "encoder", "TokenEncoder"),
    ("roles.tokens.frames.FrameEncoder", "encoder", "TokenEncoder"),
    ("roles.tokens.text.TextEncoder", "encoder", "TokenEncoder"),
    ("roles.tokens.reconstruct.GridDecoder", "decoder", ("CellDecoder",)),
    ("roles.tokens.reconstruct.MaskedReconstruction", "objective", ()),
    ("roles.tokens.reconstruct.PatchPixels", "part", "target"),
    ("roles.tokens.reconstruct.TokenIds", "part", "target"),
    ("roles.masking.RandomMask", "part", "masking"),
    ("roles.masking.BlockMask", "part", "masking"),
    ("roles.masking.SpanMask", "part", "masking"),
    ("roles.masking.GridMask", "part", "masking"),
    ("roles.masking.ContextSubset", "part", "masking"),
    ("roles.probes.classify.Classify", "objective", ()),
    ("roles.probes.knn.KNNProbe", "callback", ()),
    ("roles.probes.linear.LinearProbe", "callback", ()),
    ("roles.probes.attentive.AttentiveProbe", "callback", ()),
    ("roles.probes.health.Health", "callback", ()),
    ("roles.latent.conv.ConvVectorEncoder", "encoder", "VectorEncoder"),
    ("roles.latent.mlp.MlpVectorEncoder", "encoder", "VectorEncoder"),
    ("roles.latent.plain.FlatPixels", "encoder", "VectorEncoder"),
    ("roles.latent.pca.PCAEncoder", "encoder", "VectorEncoder"),
    ("roles.latent.noise.CoordinateNoise", "part", "corruption"),
    ("roles.latent.plain.Pooled", "encoder", "VectorEncoder"),
    ("roles.latent.conv.ConvVectorDecoder", "decoder", "PixelDecoder"),
    ("roles.latent.mlp.MlpVectorDecoder", "decoder", "PixelDecoder"),
    ("roles.reconstruction.Reconstruction", "objective", ()),
    ("datasets.text.TextTokens", "data", ()),
    ("datasets.algorithmic.Algorithmic", "data", ()),
    ("datasets.pairs.Pairs", "data", ()),
    ("datasets.corrupted.CorruptedText", "data", ()),
    ("datasets.corrupted.CopyEdits", "data", ()),
    ("roles.language.models.CausalLM", "decoder", "StepModel"),
    ("roles.language.models.Seq2SeqDecoder", "decoder", "StepModel"),
    ("roles.language.hf.HFCausal", "decoder", "StepModel"),
    ("roles.language.hf.HFSeq2Seq", "decoder", "StepModel"),
    ("roles.language.next_token.NextToken", "objective", ()),
    ("roles.language.next_token.Seq2SeqTokens", "objective", ()),
    ("roles.language.loop.Greedy", "sampler", ()),
    ("roles.language.loop.Sample", "sampler", ()),
    ("roles.language.loop.Speculative", "sampler", ()),
    ("roles.language.beam.BeamSearch", "sampler", ()),
    ("roles.language.accept.Exact", "part", "acceptance"),
    ("roles.language.accept.SampleOnce", "part", "acceptance"),
    ("roles.language.metrics.AcceptanceStats", "metric", ()),
    ("roles.language.bigram.BigramFloor", "callback", ()),
    ("roles.language.guard.SpeedGuard", "part", "guard"),
    ("roles.language.drafters.PromptCopy", "part", "drafter"),
    ("roles.language.drafters.Scripted", "part", "drafter"),
    ("roles.language.drafters.SmallModel", "part", "drafter"),
    ("roles.language.drafters.SelfDraft", "part", "drafter"),
    ("roles.language.drafters.DraftUnion", "part", "drafter"),
    ("roles.language.ngrams.NGramStore", "part", "store"),
    ("roles.language.text.Bytes", "part", "tokenizer"),
    ("roles.language.text.BPE", "part", "tokenizer"),
    ("roles.language.text.Words", "part", "tokenizer"),
    ("roles.language.text.HFTokenizer", "part", "tokenizer"),
    ("roles.language.text.SentencePiece", "part", "tokenizer"),
    ("datasets.activations.module.Activations", "data", ()),
    ("datasets.activations.store_codes.StoreCodes", "callback", ()),
    ("datasets.planted.PlantedFeatures", "data", ()),
    ("roles.sparse.encoder.SparseEncoder", "encoder", "SparseEncoder"),
    ("roles.sparse.decoder.SparseDecoder", "decoder", "SparseDecoder"),
    ("roles.sparse.formats.dictionary.SparseDictionary", "encoder", "SparseEncoder"),
    ("roles.sparse.objective.SparseReconstruction", "objective", ()),
    ("roles.sparse.selectors.ReLU", "part", "selector"),
    ("roles.sparse.selectors.TopK", "part", "selector"),
    ("roles.sparse.selectors.BatchTopK", "part", "selector"),
    ("roles.sparse.selectors.Matryoshka", "part", "selector"),
    ("roles.sparse.jumprelu.JumpReLU", "part", "selector"),
    ("roles.sparse.rows.UnitNormRows", "callback", ()),
    ("roles.sparse.dead.DeadLatents", "callback", ()),
    ("roles.sparse.resample.Resample", "callback", ()),
    ("roles.sparse.watching.SparseCard", "callback", ()),
    ("roles.sparse.bank.DictionaryBank", "objective", ()),
    ("roles.sparse.bank.BankMember", "part", "dictionary"),
    ("roles.sparse.coherence.DecoderCoherence", "metric", ()),
    ("roles.sparse.coherence.PlantedRecovery", "metric", ()),
]


@hookimpl
def quire_components(register: Callable) -> None:
    """Core's components."""
    for path, kind, role in COMPONENTS:
        register(f"quire.{path}", kind, role)


@hookimpl
def quire_commands(register: Callable) -> None:
    """Core's commands, beside Lightning's fit, validate, test and predict."""
    register("plugins", "quire.commands.plugins", "installed plugins, broken ones with their error")
    register("components", "quire.commands.components", "every component: name, kind, roles, plugin")
    register("configs", "quire.commands.configs", "YAML files that plugins ship, for -c plugin/name")
    register("doctor", "quire.commands.doctor", "check versions, plugins and the machine")
    register("matrix", "quire.commands.matrix", "which parts fit which")
    register("mix", "quire.mixing.command", "a config that puts named parts together, tried for three steps")
    register("new", "quire.commands.new", "start a plugin of your own")
    register("export", "quire.commands.export", "write a trained model as safetensors, or its encoder for timm")
    register("reproduce", "quire.reproduce.main", "run a plugin's claim against its controls")
    register("bench", "quire.bench.main", "measure a role's speed on this machine: quire bench language")
    register("consolidate", "quire.sharding.consolidate", "one checkpoint file out of a folder of shards")
    register("ray", "quire.raytrain.main", "run a config on the workers of a Ray cluster")
    register("harvest", "quire.datasets.activations.harvest.main", "store what a subject holds at a site")
    register("report", "quire.roles.sparse.report.command.main", "one HTML page of what a dictionary's latents fire on")
    register("probe", "quire.roles.probes.command.main", "judge a checkpoint's frozen encoder")
