"""The objectives: what they ask of the network, the schedule of σ, and every refusal."""

import pytest
import torch
from lightning.pytorch import Callback

from quire import Sum
from quire.checkpoint import load
from quire.datasets.images import Digits
from quire.errors import ConfigError, DataError
from quire.roles.latent.conv import ConvVectorDecoder, ConvVectorEncoder
from quire.roles.latent.mlp import MlpVectorDecoder, MlpVectorEncoder
from quire.roles.reconstruction import Reconstruction
from quire_dae_score.denoiser import GaussianDenoiser
from quire_dae_score.modules import ScoreMlp
from quire_dae_score.objective import Contractive, Denoising

IMAGES = {"image_size": [8, 8], "channels": 1, "classes": 10}


class StopAt(Callback):
    """Ends training after some steps of a longer run."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


def pair(**given):
    return {"encoder": MlpVectorEncoder(widths=[32]), "decoder": MlpVectorDecoder(widths=[32], **given)}


def test_the_loss_is_summed_over_features_and_meaned_over_the_batch(make):
    """A network of zeros: r(x + ε) − x = ε with the residual form, so the loss is σ²·D."""
    model = make(Denoising(0.3, "image"), IMAGES, encoder=ScoreMlp(widths=[4]))
    for parameter in model.encoder.parameters():
        torch.nn.init.zeros_(parameter)
    batch = {"image": torch.rand(2000, 1, 8, 8)}
    assert model.objective(model, batch)["denoise"].item() == pytest.approx(0.09 * 64, rel=0.02)


def test_the_noise_comes_from_the_models_generator_and_evaluation_is_noisy_too(make):
    model = make(Denoising(0.4, "vector")).eval()
    batch = {"vector": torch.randn(8, 2)}
    first, second = (model.objective(model, batch).outputs["noisy"] for _ in range(2))
    model.generator().manual_seed(model._key)
    third = model.objective(model, batch).outputs["noisy"]
    assert torch.equal(first, third) and not torch.equal(first, second) and not torch.equal(first, batch["vector"])


@pytest.mark.parametrize(("sigma", "dtype"), [(0.2, torch.float32), (0.01, torch.float32)])
def test_a_small_sigma_loses_no_digits_with_the_residual_form(make, sigma, dtype):
    """s is the network's output itself; (r − x)/σ² in float32 would lose 1e-7/σ²."""
    model = make(Denoising(sigma, "vector"))
    x = 5 + torch.randn(100, 2, dtype=dtype)
    score = model.objective.score(model, x)
    double = model.double().objective.score(model, x.double())
    assert (score.double() - double).abs().max() < 1e-5


@pytest.mark.parametrize(("decoder", "objective"), [("mlp", Denoising), ("conv", Denoising), ("mlp", Contractive)])
def test_pairs_of_vector_codes_learn(make, trainer, decoder, objective):
    parts = pair()
    if decoder == "conv":
        parts = {
            "encoder": ConvVectorEncoder(channels=[8, 4], init_std=None),
            "decoder": ConvVectorDecoder(channels=[8, 4], init_std=None),
        }
    model = make(objective(0.3, residual=False), IMAGES, **parts)
    data = Digits(batch_size=128, train_samples=512)
    batch = data.dataset("train").__getitems__(list(range(64)))
    total = lambda: sum(v.item() for v in model.objective(model, batch).values())  # noqa: E731
    before = total()
    trainer(max_epochs=8).fit(model, datamodule=data)
    assert total() < before - 0.2


def test_latents_of_a_latent_encoder_serve_with_a_decoder(make):
    from quire.contracts import Decoder
    from quire.roles.latent import LatentCodes, LatentEncoder

    class Grid(LatentEncoder):
        fields = ("image",)
        width = 1

        def forward(self, batch):
            return LatentCodes(batch["image"].flatten(1)[..., None] * 0.5, (8, 8))

    class Back(Decoder):
        def forward(self, codes):
            return codes.latents.view(-1, 1, 8, 8)

    model = make(Denoising(0.3, residual=False), IMAGES, encoder=Grid(), decoder=Back())
    x = torch.rand(3, 1, 8, 8)
    torch.testing.assert_close(model.objective.restore(model, {"image": x}, 0.3), x / 2)
    torch.testing.assert_close(model.objective.score(model, x), -x / 2 / 0.09)


# ---- schedule
def test_a_schedule_goes_through_its_sigmas_in_equal_parts_and_ends_at_the_last(make, trainer, toy, tmp_path):
    objective = Denoising([0.4, 0.2, 0.1], "vector")
    model = make(objective)
    seen = []
    objective.register_forward_pre_hook(lambda *_: seen.append(None))
    objective.register_forward_hook(lambda module, *_: seen.__setitem__(-1, module.sigma))
    run = trainer(max_steps=12)
    run.fit(model, datamodule=toy(samples=1024))
    assert seen[:12] == [0.4] * 4 + [0.2] * 4 + [0.1] * 4
    run.save_checkpoint(tmp_path / "a.ckpt")
    again = load(tmp_path / "a.ckpt")
    assert again.objective.sigma == 0.1, "chains of the loaded model use the σ that training ended with"


def test_a_checkpoint_in_the_middle_of_a_schedule_keeps_its_sigma(make, trainer, toy, tmp_path):
    model = make(Denoising([0.4, 0.2, 0.1], "vector"))
    run = trainer(max_steps=12, callbacks=[StopAt(6)])
    run.fit(model, datamodule=toy(samples=1024))
    run.save_checkpoint(tmp_path / "a.ckpt")
    assert load(tmp_path / "a.ckpt").objective.sigma == 0.2


def test_half_precision_keeps_sigma(make):
    model = make(Denoising(0.3, "vector")).to(torch.bfloat16)
    assert model.objective.sigma == 0.3


def test_another_sigma_than_the_checkpoints_is_refused(make):
    trained, other = make(Denoising(0.3, "vector")), make(Denoising(0.5, "vector"))
    other.load_state_dict(trained.state_dict())
    said = "the checkpoint was trained with sigma 0.3, but Denoising.sigma is 0.5: training and sampling need the same"
    with pytest.raises(ConfigError, match=f"^{said}$"):
        other.objective.score(other, torch.zeros(1, 2))


# ---- roles
def test_a_sum_has_the_role_of_its_one_denoiser():
    one = Denoising(0.2)
    assert Sum([one, Reconstruction()]).role(GaussianDenoiser) is one
    assert Sum([one, Contractive(0.2)]).role(GaussianDenoiser) is None
    assert Reconstruction().role(GaussianDenoiser) is None


# ---- bad input
@pytest.mark.parametrize("sigma", [0, -0.1, float("nan"), float("inf"), [], [0.2, 0.0]])
@pytest.mark.parametrize("objective", [Denoising, Contractive])
def test_a_sigma_that_is_not_positive_is_refused(objective, sigma):
    with pytest.raises(ConfigError, match=rf"^{objective.__name__}.sigma must be positive, got "):
        objective(sigma)


@pytest.mark.parametrize("sigma", [[0.1, 0.2], [0.2, 0.2], [0.5, 0.1, 0.3]])
def test_a_schedule_that_does_not_fall_is_printed(sigma):
    with pytest.raises(ConfigError) as found:
        Denoising(sigma)
    assert str(found.value) == f"Denoising.sigma must fall from stage to stage, got {[float(s) for s in sigma]}"


def test_a_schedule_without_an_end_is_refused(make, trainer, toy):
    model = make(Denoising([0.4, 0.2], "vector"))
    with pytest.raises(ConfigError, match="needs an end"):
        trainer(max_epochs=-1).fit(model, datamodule=toy())


def test_images_of_bytes_are_refused(make):
    model = make(Denoising(0.3, residual=False), IMAGES, **pair())
    with pytest.raises(DataError, match="^image is uint8; Denoising needs floats$"):
        model.objective(model, {"image": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)})


def test_vectors_of_another_width_are_refused(make):
    model = make()
    with pytest.raises(ConfigError, match="^x0 has 3 features, model 2$"):
        model.objective(model, {"vector": torch.zeros(4, 3)})


def test_an_exact_jacobian_of_a_large_image_is_refused(make):
    spec = {"image_size": [28, 28], "channels": 1}
    with pytest.raises(ConfigError, match="^d is 784, use jacobian=hutchinson$"):
        make(Contractive(0.3, residual=False), spec, **pair())
    make(Contractive(0.3, "hutchinson", residual=False), spec, **pair())


def test_a_sigmoid_can_not_be_a_score(make):
    said = "residual is true, but MlpVectorDecoder ends in a sigmoid, which no score does: set residual: false"
    with pytest.raises(ConfigError, match=said):
        make(Denoising(0.3), IMAGES, **pair())
    make(Denoising(0.3), IMAGES, **pair(output="none"))


def test_codes_of_another_size_need_a_decoder(make):
    with pytest.raises(
        ConfigError, match="needs codes of the data's size 64, MlpVectorEncoder gives 10: set model.dec"
    ):
        make(Denoising(0.3), IMAGES, encoder=MlpVectorEncoder())


def test_an_encoder_of_tokens_is_told_to_be_pooled(make):
    from quire.roles.tokens.vit import ViTEncoder

    with pytest.raises(
        ConfigError, match="Denoising needs a VectorEncoder; ViTEncoder gives tokens .B,T,D., wrap it in"
    ):
        make(Denoising(0.3), IMAGES, encoder=ViTEncoder(patch=2, width=16, depth=1, heads=2))


def test_data_without_the_field_are_refused(make, trainer, toy):
    model = make(Denoising(0.3), IMAGES, encoder=ScoreMlp(widths=[4]))
    with pytest.raises(ConfigError, match="Denoising reads the field image; ToyDensity offers vector"):
        trainer(max_steps=1).fit(model, datamodule=toy())


@pytest.mark.parametrize("given", [{"jacobian": "forward"}, {"probes": 0}, {"field": "audio"}])
def test_impossible_arguments_are_refused(given):
    with pytest.raises(ConfigError, match=r"^Contractive\.(jacobian|probes|field) must be "):
        Contractive(0.2, **given)
