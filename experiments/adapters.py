"""Models and schedules of the field, fitted to the seams of cogrpo.py. Copy what you need.

A model is an nn.Module with `forward(tokens int64 [B, L], cond [B, ...]) -> logits [B, L, V]` and
the attributes seq_len, mask_id and null_cond (None: no guidance). Its traps:

    special tokens   [MASK] is never drawn. Ban the others (PAD, CLS, UNK) yourself: logits of
                     -inf, as everywhere. All losses stay finite.
    outputs          Return the tensor: `.logits` of a transformers output, not the output.
    float types      Keep the weights that learn in float32. autocast belongs inside `forward`:
                     around the loop it keeps old weights, and is refused. In bfloat16 small
                     updates vanish; in float16 Adam makes them NaN. A frozen backbone may be of
                     any type.
    copies           `train` deep-copies the model. A forward that was replaced on the instance
                     (model.forward = torch.compile(model.forward)) still uses the weights of the
                     original, and is refused: wrap it in a module instead.
    checkpointing    `train` puts the model in eval mode, so that dropout does not disturb the
                     ratios. Many models checkpoint their gradients in training mode only: turn
                     that on inside `forward`, not by `.train()`.
    processes        See distributed.py. DDP or FSDP belong inside the adapter, around the backbone.
    memory           For text V dominates: a rollout holds 6 to 9 tensors [B, L, V] at its peak, an
                     update 12 to 14 (experiments.benchmark). `micro_groups` divides B. At
                     V = 126,464, L = 128 and float32 one of them is 65 MB a sample.
    large guidance   The schedule explores by a fixed std in softplus space, so a w of 9 moves by
                     about 0.3. It multiplies what theta does: lower lr by about as much.

No package but torch is needed here; the tests run all of it on stubs with the real signatures.
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ------------------------------------------------------------------ models

class MaskedLM(nn.Module):
    """A masked language model of transformers with prompts: LLaDA, or a BERT.

    cond int64 [B, P] are prompts, the canvas is the answer. A prompt of [MASK]s is LLaDA's own
    unconditional one. banned: ids that no answer may have. pad_id: what fills up shorter prompts,
    on their left, so that prompt and answer stay neighbours; it is hidden by the attention mask.
    Models whose positions are absolute (a BERT) also need position_ids: pass them in `lm`. The
    unconditional prompt is one of full length P.
    """

    def __init__(self, lm, seq_len, mask_id, banned=(), pad_id=None):
        super().__init__()
        self.lm, self.seq_len, self.mask_id, self.pad_id = lm, seq_len, mask_id, pad_id
        self.null_cond = mask_id
        self.banned = list(banned)

    def forward(self, tokens, cond):
        ids = torch.cat([cond, tokens], 1)                # [B, P + L]
        attention_mask = torch.ones_like(ids)
        if self.pad_id is not None:
            attention_mask[:, :cond.shape[1]] = cond != self.pad_id
        logits = self.lm(input_ids=ids, attention_mask=attention_mask).logits
        logits = logits[:, cond.shape[1]:].float()  # [B, L, V], those of the answer
        logits[:, :, self.banned] = -math.inf
        return logits


class TextToImage(nn.Module):
    """aMUSEd's and Meissonic's transformer (UVit2DModel of diffusers), with text conditions.

    cond float [B, 1 + S, D]: the pooled text embedding, then the S hidden states of the encoder,
    both padded to the same D with zeros. null: the same of the empty prompt, [1 + S, D].
    """

    def __init__(self, transformer, side, mask_id, null, pooled_dim, hidden_dim, micro_conds):
        super().__init__()
        self.transformer, self.side, self.mask_id = transformer, side, mask_id
        self.seq_len = side * side
        self.pooled_dim, self.hidden_dim = pooled_dim, hidden_dim
        self.register_buffer("null_cond", null)
        self.register_buffer("micro_conds", micro_conds)  # [5]: width, height, crop, aesthetic

    def forward(self, tokens, cond):
        logits = self.transformer(
            tokens.view(-1, self.side, self.side),
            encoder_hidden_states=cond[:, 1:, :self.hidden_dim],
            pooled_text_emb=cond[:, 0, :self.pooled_dim],
            micro_conds=self.micro_conds.expand(len(tokens), -1))  # [B, V, side, side]
        return logits.flatten(2).transpose(1, 2)


def text_condition(pooled, hidden):
    """pooled [C, D1] and hidden [C, S, D2] in one tensor [C, 1 + S, max(D1, D2)]."""
    D = max(pooled.shape[1], hidden.shape[2])
    pooled = F.pad(pooled, (0, D - pooled.shape[1]))[:, None]
    return torch.cat([pooled, F.pad(hidden, (0, D - hidden.shape[2]))], 1)


class LoRALinear(nn.Module):
    """A frozen linear layer and two small matrices that learn; peft's layers do as well.

    `train` copies what learns and shares what is frozen, so a backbone is in memory once. So
    merge the matrices into the weights in a deepcopy of the result, never in place: the model
    that you gave to `train` has the same frozen weights.
    """

    def __init__(self, linear, rank=8, scale=1.0):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        device = linear.weight.device
        self.down = nn.Linear(linear.in_features, rank, False, device, torch.float32)
        self.up = nn.Linear(rank, linear.out_features, False, device, torch.float32)
        self.scale = scale
        nn.init.zeros_(self.up.weight)  # it starts as the layer that it wraps

    def forward(self, x):
        learned = self.up(self.down(x.to(self.down.weight.dtype)))
        return self.linear(x) + (self.scale * learned).to(x.dtype)


def add_lora(model, names, rank=8):
    """Freeze a model and wrap its linear layers called `names`, in all blocks.

    A name is the end of a path, "q_proj" or "attention.query". ValueError if one fits no layer.
    """
    linear = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    for name in names:
        if not any(f".{path}".endswith(f".{name}") for path in linear):
            ends = sorted({path.rpartition(".")[2] for path in linear})
            raise ValueError(f"add_lora: no linear layer is called {name}, but {', '.join(ends)}")
    model.requires_grad_(False)
    for path in linear:
        if any(f".{path}".endswith(f".{name}") for name in names):
            parent, _, last = path.rpartition(".")
            wrapped = LoRALinear(model.get_submodule(path), rank)
            setattr(model.get_submodule(parent), last, wrapped)
    return model


def string_reward(decode, judge):
    """A reward from a judge of strings: decode(list of ids) -> str, judge(prompt, answer) -> float.

    Its float32 tensor is on the CPU; `train` moves it.
    """
    def reward_fn(tokens, cond):
        pairs = zip(cond.tolist(), tokens.tolist())
        return torch.tensor([float(judge(decode(p), decode(a))) for p, a in pairs])
    return reward_fn


# ------------------------------------------------------------------ schedules
#
# Each is a `hand_made` for Schedule. Left out, for it cannot be said so: a sampler that overwrites
# filled tokens (valeoai's), blocks that are filled one after the other (LLaDA's block_length), a
# temperature of exactly 0 (1e-6 stands for it), and a token that stays masked where r L < 1.

def amused(t, T, guidance=10.0, temperature=2.0):
    """aMUSEd's: r = cos(pi u / 2), ranking noise falling to 0; its guidance is 1 + w."""
    falling = temperature * (1 - t / max(T - 1, 1))
    return math.cos(math.pi * (t + 1) / T / 2), 1.0, falling, guidance - 1


def adagen(t, T, temperature=4.5, sampling=1.0, guidance=1.0):
    """AdaGen's default for MaskGIT models: guidance rises, ranking noise falls."""
    u = (t + 1 - 1e-3) / T
    return math.cos(math.pi * u / 2), sampling, temperature * (1 - u), guidance * (t + 1e-3) / T


def llada(t, T, temperature=1.0, guidance=0.0):
    """LLaDA's in one block, low-confidence remasking, where T divides the number masked."""
    return 1 - (t + 1) / T, temperature, 0.0, guidance
