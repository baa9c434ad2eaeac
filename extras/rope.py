"""RoPE scalings: how a decoder that learned short texts turns its queries and keys in long ones.

extras/pretrained_model.py uses them; there is no command. config.json of a folder names the
scaling and its numbers, in the old (`rope_scaling`) or the new spelling (`rope_parameters`).
"""

import math

LENGTH = "original_max_position_embeddings"
NUMBERS = {  # kind -> the numbers that a run keeps of it, as `rope_scaling`
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", LENGTH),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", LENGTH),
    "yarn": ("factor", "attention_factor", "beta_fast", "beta_slow", "truncate", LENGTH),
}
OLD = {0: "default", 1: "linear", 4: "llama3"}  # earlier runs kept the numbers without the kind


def rope_of(hf: dict) -> dict:
    """What config.json says of RoPE, in either spelling, without nulls"""
    given = hf.get("rope_scaling") or hf.get("rope_parameters") or {}
    return {key: value for key, value in given.items() if value is not None}


def read_scaling(hf: dict, max_length: int) -> tuple[str, tuple[float, ...]]:
    """config.json -> the kind and its numbers; what the file leaves out is as in transformers.

    max_length: max_position_embeddings.  Raises ValueError for another kind or a missing number.
    """
    rope = rope_of(hf)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in NUMBERS:
        raise ValueError(f"rope_type must be {' or '.join(NUMBERS)}, got {kind!r:.60}")
    rope[LENGTH] = hf.get(LENGTH) or rope.get(LENGTH, max_length)
    if kind == "dynamic":  # it never looks at the original length
        rope[LENGTH] = max_length
    if kind == "yarn":
        rope = yarn_numbers(rope, max_length)
    found = []
    for name in NUMBERS[kind]:
        if name not in rope:
            raise ValueError(f"{kind} RoPE must have a {name}, got none")
        found.append(rope[name])
    return kind, tuple(found)


def yarn_numbers(rope: dict, max_length: int) -> dict[str, float]:
    """All numbers of YaRN, those that the file leaves out too"""
    factor = rope.get("factor", max_length / rope[LENGTH])
    scales = (rope.get("mscale"), rope.get("mscale_all_dim"))
    attention = yarn_attention(factor, 1)
    if all(scales):
        attention = yarn_attention(factor, scales[0]) / yarn_attention(factor, scales[1])
    return {
        "factor": factor,
        "attention_factor": rope.get("attention_factor", attention),
        "beta_fast": rope.get("beta_fast") or 32,
        "beta_slow": rope.get("beta_slow") or 1,
        "truncate": int(rope.get("truncate", True)),
        LENGTH: rope[LENGTH],
    }


def yarn_attention(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1


def check_scaling(theta: float, kind: str, numbers: tuple[float, ...]) -> None:
    """Raises ValueError unless `numbers` are those of the kind."""
    names = NUMBERS[kind]
    if len(numbers) != len(names):
        raise ValueError(f"rope_scaling must be {', '.join(names)} for {kind} RoPE, got {numbers}")
    for name, number in zip(names, numbers, strict=True):
        if not (2**-31 < number < 2**31 or name == "truncate"):
            rule = f"{name} of {kind} RoPE must be above 0 and below 2**31"
            raise ValueError(f"{rule}, got {number!r:.60}")
    if kind == "llama3" and numbers[1] > numbers[2]:
        raise ValueError(f"low_freq_factor must be at most high_freq_factor, got {numbers}")
    if kind == "yarn" and theta <= 1:
        raise ValueError(f"rope_theta must be above 1 for YaRN, got {theta}")


def scale_frequencies(
    frequency: list[float], theta: float, kind: str, numbers: tuple[float, ...]
) -> list[float]:
    """Frequencies of model.rope_frequencies -> those of a scaling

    A dynamic one changes nothing up to the original length, and is refused beyond it.
    """
    if kind == "linear":
        return [f / numbers[0] for f in frequency]
    if kind == "llama3":
        return scale_long_waves(frequency, *numbers)
    if kind == "yarn":
        return scale_yarn(frequency, theta, *numbers)
    return frequency


def scale_long_waves(
    frequency: list[float], factor: float, low: float, high: float, length: float
) -> list[float]:
    """Llama 3: waves that fit into the original length `high` times stay, those below `low` slow"""
    scaled = []
    for f in frequency:
        waves = length * f / (2 * math.pi)
        if waves >= high:
            same = 1.0
        elif waves <= low:
            same = 0.0
        else:
            same = (waves - low) / (high - low)
        scaled.append(same * f + (1 - same) * f / factor)
    return scaled


def scale_yarn(
    frequency: list[float],
    theta: float,
    factor: float,
    attention: float,
    fast: float,
    slow: float,
    truncate: float,
    length: float,
) -> list[float]:
    """YaRN (arXiv 2309.00071): between the pairs that turn `fast` and `slow` times in the original
    length, a ramp from unscaled to slowed. `attention` scales queries and keys, see Attention.
    """
    pairs = len(frequency)
    first = pair_turning(fast, length, pairs, theta)
    last = pair_turning(slow, length, pairs, theta)
    if truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    width = (last - first) or 0.001
    scaled = []
    for pair, f in enumerate(frequency):
        slowed = min(1.0, max(0.0, (pair - first) / width))
        scaled.append((1 - slowed) * f + slowed * f / factor)
    return scaled


def pair_turning(times: float, length: float, pairs: int, theta: float) -> float:
    """The pair of a head's numbers, as a fraction, that turns so many times in a length"""
    return pairs * math.log(length / (times * 2 * math.pi)) / math.log(theta)
