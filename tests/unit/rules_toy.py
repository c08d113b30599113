"""Small vectors for the tests of merging rules."""

import torch

SHAPES = {
    "enc.layers.0.w": (6, 9),
    "enc.layers.1.w": (4, 3, 5),
    "norm": (7,),
    "gain": (),
    "empty": (0, 3),
}


def make(number, seed=0, shapes=SHAPES, levels=None):
    """Random vectors; with `levels`, small integers, so that many tie."""
    generator = torch.Generator().manual_seed(seed)
    vectors = []
    for _ in range(number):
        vector = {}
        for name, shape in shapes.items():
            if levels:
                value = torch.randint(
                    -levels, levels + 1, shape, generator=generator
                ).float()
            else:
                value = torch.randn(shape, generator=generator)
            vector[name] = value
        vectors.append(vector)
    return vectors
