"""What lets a model of transformers run in float64 from end to end.

Two of its parts compute in float32 whatever the model's type is: RMSNorm and the rotary angles.
Here they are replaced by the same formulas in float64, or nothing could be compared beyond seven
digits.
Softmax stays in float64 because the default attention (torch's scaled_dot_product_attention) is
used: the "eager" one of the same library casts it to float32.
"""

import torch


def in_float64(model):
    """The model itself, changed in place: weights and all arithmetic in float64."""
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):
            module.forward = rms_norm(module.weight, module.variance_epsilon)
        elif kind.endswith("RotaryEmbedding"):
            module.forward = rotary(2 * len(module.inv_freq), model.config.rope_parameters)
    return model.double()


def rms_norm(weight, eps):
    return lambda x: torch.nn.functional.rms_norm(x, weight.shape, weight, eps)


def rotary(width, parameters):
    """cos and sin (..., T, width) for ``width`` rotated columns of each head."""
    assert parameters["rope_type"] == "default", parameters

    def forward(x, position_ids):
        exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
        angle = position_ids[..., None] * parameters["rope_theta"] ** -exponent
        angle = torch.cat([angle, angle], -1)
        return angle.cos(), angle.sin()

    return forward
