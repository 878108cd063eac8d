"""Multiplications of a step by part, from the sizes of its networks (spec section 11).

Counted are multiply-accumulates (MAC) of matrix products, of one image; 1 MAC = 2 FLOP. Norms, activations,
softmax, the optimizer and the moving average are left out, as everywhere in the field.
"""

from dataclasses import dataclass
from typing import Any

from torch import nn

from cmt_mae.method.cmtmae import (
    FROM_IMAGE,
    Alphas,
    MaskConfig,
    StudentWithDecoder,
    TargetConfig,
    takes_class_token,
)
from cmt_mae.method.frozen import FrozenNetworks, shares
from cmt_mae.method.last_block import asks_alone
from cmt_mae.method.masking import GUIDED
from cmt_mae.method.vit import Vit, grid_of, has_class_token, num_prefix

PARTS = ("teacher", "momentum", "mask", "encoder", "decoder", "backward")


@dataclass(frozen=True)
class Net:
    """Sizes of a transformer of equal blocks. The last six are weights, that is MAC a token."""

    patches: int
    """Patch tokens of a full image."""
    prefix: int
    """Tokens before them: class token, registers."""
    depth: int
    """Number of blocks."""
    attention: int
    """Channels of all heads together."""
    embedding: int
    """Patch embedding, a patch."""
    query: int
    """Making the queries; keys and values cost as much each."""
    output: int
    """Linear layer behind the attention."""
    mlp: int
    """MLP."""
    projection: int = 0
    """After the final norm (CLIP's 768 x 512), 0 for none."""

    @property
    def tokens(self) -> int:
        """All tokens of a full image."""
        return self.prefix + self.patches

    def block(
        self, seen: int, asking: int | None = None, put_out: int | None = None, finished: int | None = None
    ) -> int:  # fmt: skip
        """MAC of one block over ``seen`` tokens: 12 n d^2 + 2 n^2 d for a plain one.

        asking: tokens with a query, put_out: through the output layer, finished: through the MLP; default: all.
        """
        asking = seen if asking is None else asking
        put_out = seen if put_out is None else put_out
        finished = seen if finished is None else finished
        products = 2 * asking * seen * self.attention
        linear = asking * self.query + 2 * seen * self.query + put_out * self.output
        return linear + finished * self.mlp + products

    def before_last(self) -> int:
        """A full image through the embedding and all blocks but the last."""
        return self.patches * self.embedding + (self.depth - 1) * self.block(self.tokens)


@dataclass(frozen=True)
class Guide:
    """A frozen network and what a step wants of it."""

    net: Net
    attention: str
    """none | class (one row) | columns (mean of the map) | probe (SigLIP's pooling)."""
    features: bool
    """Whether its features are predicted."""
    hidden: int | None
    """Patches that the last block must finish; None: all tokens."""
    projected: int
    """Tokens that are projected, where there is a projection."""
    probe: int = 0
    """MAC of the pooling probe, an image."""
    plain: bool = True
    """timm's plain attention: some tokens can ask without the others, the map shares the keys."""


@dataclass(frozen=True)
class Step:
    """Everything that the multiplications of a step depend on."""

    student: Net
    visible: int
    hidden: int
    decoder: Net
    """Its ``embedding`` is that of a latent of the student."""
    prompting: bool
    """MILAN's decoder: hidden tokens ask, all tokens are seen."""
    predicted: int
    """Tokens that the heads are applied to."""
    heads: int
    """Weights of all heads that learn."""
    teacher: Guide | None
    momentum: Guide | None


@dataclass(frozen=True)
class Cuts:
    """Exact savings (spec section 11, the list of "legal" cuts). Nothing set: the plain way of the table."""

    visible_embedding: bool = False
    """1: only visible patches are embedded by the student."""
    predicted_heads: bool = False
    """2: heads at the tokens of the loss only."""
    last_decoder_block: bool = False
    """3: the last decoder block finishes hidden tokens only, where the loss is taken at those alone."""
    last_guide_block: str = "all"
    """4: all (every token through everything) | asked (queries, output layer and MLP of hidden tokens, and the
    class token's query for the map; where positions are rotary or relative: attention of every token)."""


PLAIN = Cuts()
# What method/ does today; tests/tools/test_flops.py holds it against torch's counter on the real modules.
OURS = Cuts(True, True, True, "asked")


def step_macs(step: Step, cuts: Cuts = OURS) -> dict[str, int]:
    """MAC of one image by part (``PARTS``). "decoder" includes the heads, "mask" the attention maps.

    Backward is twice the forward of encoder and decoder, but once for the patch embedding, whose input needs
    no gradient.
    """
    embedded = step.visible if cuts.visible_embedding else step.student.patches
    embedding = embedded * step.student.embedding
    seen = step.student.prefix + step.visible
    encoder = embedding + step.student.depth * step.student.block(seen)
    decoder = decoder_macs(step, cuts)
    guides = {
        name: (0, 0) if guide is None else guide_macs(guide, cuts)
        for name, guide in (("teacher", step.teacher), ("momentum", step.momentum))
    }
    return {
        **{name: run for name, (run, _) in guides.items()},
        "mask": sum(look for _, look in guides.values()),
        "encoder": encoder,
        "decoder": decoder,
        "backward": 2 * (encoder + decoder) - embedding,
    }


def decoder_macs(step: Step, cuts: Cuts) -> int:
    """Forward of decoder and heads."""
    net, hidden = step.decoder, step.hidden
    macs = (step.student.prefix + step.visible) * net.embedding
    if step.prompting:
        macs += net.depth * net.block(net.tokens, hidden, hidden, hidden)
    elif net.depth and cuts.last_decoder_block and step.predicted == hidden:
        last = net.block(net.tokens, hidden, hidden, hidden)
        macs += (net.depth - 1) * net.block(net.tokens) + last
    else:
        macs += net.depth * net.block(net.tokens)
    return macs + (step.predicted if cuts.predicted_heads else net.tokens) * step.heads


def guide_macs(guide: Guide, cuts: Cuts) -> tuple[int, int]:
    """(MAC of the network's own pass, MAC of its attention map)."""
    net = guide.net
    if guide.attention == "none" and not guide.features:
        return 0, 0
    if cuts.last_guide_block == "all":  # a user's pass: everything runs, the map is read out of it
        run = net.before_last() + net.block(net.tokens) + net.tokens * net.projection
        return run, guide.probe
    run, look = net.before_last(), map_macs(guide)
    if guide.attention == "probe":  # needs every feature itself
        run += net.block(net.tokens)
    elif guide.features:
        run += last_block(guide)
    return run + guide.projected * net.projection * guide.features, look


def last_block(guide: Guide) -> int:
    """The last block where only the hidden patches are needed."""
    net, hidden = guide.net, guide.hidden
    if hidden is None:
        return net.block(net.tokens)
    if guide.plain:
        return net.block(net.tokens, hidden, hidden, hidden)
    return net.block(net.tokens, finished=hidden)


def map_macs(guide: Guide) -> int:
    """The attention map from the input of the last block (spec 1: one row, no N x N).

    Its keys are not counted where the features are wanted too and share them.
    """
    net = guide.net
    shared = guide.features and guide.plain and guide.hidden is not None
    keys = 0 if shared else net.tokens * net.query
    if guide.attention == "class":
        return net.query + keys + net.tokens * net.attention
    if guide.attention == "columns":
        return net.tokens * net.query + keys + net.tokens**2 * net.attention
    return guide.probe if guide.attention == "probe" else 0


# --- sizes of real modules ---------------------------------------------------------------------


def step_of(
    learner: StudentWithDecoder, guides: FrozenNetworks, weights: Alphas, n_mask: int
) -> Step:
    """Sizes of a step of these modules with these weights (they tell the stage)."""
    student, decoder = learner.student, learner.decoder
    rows, columns = grid_of(student)
    patches, target = rows * columns, learner.target
    names = active(guides.mask, target, weights)
    predicted = tokens_of(target, n_mask, patches)
    width = decoder.embed.out_features
    blocks = list(decoder.blocks)
    first: Any = blocks[0] if blocks else nn.Identity()
    return Step(
        student=net_of(student),
        visible=patches - n_mask,
        hidden=n_mask,
        decoder=Net(
            patches=patches, prefix=1, depth=len(blocks), attention=width,
            embedding=weight_count(decoder.embed), query=width**2 if blocks else 0,
            output=width**2 if blocks else 0, mlp=weight_count(getattr(first, "mlp", first)),
        ),
        prompting=decoder.prompting,
        predicted=predicted,
        heads=sum(weight_count(learner.heads[name]) for name in names["heads"]),
        teacher=guide_of("teacher", guides, target, names, n_mask, learner),
        momentum=guide_of("momentum", guides, target, names, n_mask, learner),
    )  # fmt: skip


def active(mask: MaskConfig, target: TargetConfig, weights: Alphas) -> dict[str, list[str]]:
    """Which networks guide the mask, which are predicted, and the heads that learn."""
    looked = shares(mask.source, weights.mask) if mask.rule in GUIDED else {}
    by_network = target.source not in FROM_IMAGE
    predicted = shares(target.source, weights.loss) if by_network else {target.source: 1.0}
    heads = [name for name, weight in predicted.items() if weight > 0]
    return {
        "maps": [name for name, weight in looked.items() if weight > 0],
        "features": heads if by_network else [],
        "heads": heads,
    }


def tokens_of(target: TargetConfig, n_mask: int, patches: int) -> int:
    """Tokens of an image at which the loss is taken."""
    return (n_mask if target.tokens.startswith("masked") else patches) + takes_class_token(target)


def guide_of(
    name: str,
    guides: FrozenNetworks,
    target: TargetConfig,
    names: dict[str, list[str]],
    n_mask: int,
    learner: StudentWithDecoder,
) -> Guide | None:
    """What a step wants of the teacher or of the momentum student; None where it does not run."""
    maps, features = name in names["maps"], name in names["features"]
    if not maps and not features:
        return None
    teacher = guides.teacher
    whole = target.tokens.startswith("all")
    if name == "teacher":
        assert teacher is not None
        model: Vit = teacher.model
        projection = 0 if teacher.projection is None else teacher.projection.numel()
        resampled = teacher.own_grid != teacher.grid
        whole_block = whole or resampled or teacher.feature == "last_k"
    else:
        model, projection = learner.student, 0
        whole_block = whole or target.momentum_last_k > 1
    net = net_of(model, projection)
    kind, probe = map_kind(model, net)
    student_patches = learner.student.patch_embed.num_patches
    return Guide(
        net=net,
        attention=kind if maps else "none",
        features=features,
        hidden=None if whole_block else n_mask,
        projected=tokens_of(target, n_mask, student_patches),
        probe=probe if maps else 0,
        plain=asks_alone(model.blocks[-1].attn),
    )


def map_kind(model: Vit, net: Net) -> tuple[str, int]:
    """How the attention of this network is read, and the MAC of its pooling probe."""
    if has_class_token(model):
        return "class", 0
    pool = getattr(model, "attn_pool", None)
    if pool is None:
        return "columns", 0
    asked = pool.latent.shape[1]
    linear = asked * weight_count(pool.q) + net.tokens * weight_count(pool.kv)  # values too, unused
    return "probe", linear + asked * net.tokens * net.attention


def net_of(model: Vit, projection: int = 0) -> Net:
    """Sizes of a timm VisionTransformer, Eva or Beit. projection: weights applied after the final norm."""
    rows, columns = grid_of(model)
    block = model.blocks[0]
    attention = block.attn.proj.in_features
    inside = weight_count(block.attn) - weight_count(block.attn.proj)
    return Net(
        patches=rows * columns, prefix=num_prefix(model), depth=len(model.blocks), attention=attention,
        embedding=model.patch_embed.proj.weight.numel(), query=inside // 3,
        output=weight_count(block.attn.proj), mlp=weight_count(block.mlp), projection=projection,
    )  # fmt: skip


def weight_count(module: nn.Module) -> int:
    """Weights of all linear layers in a module: its MAC a token."""
    return sum(part.weight.numel() for part in module.modules() if isinstance(part, nn.Linear))
