"""Every rule in a few lines of torch: to read, and to test the fast ones by.

Vectors are dicts `{name: tensor}`; everything is in memory and in float64.
Each function takes the vectors and the arguments of the rule's class, without
the scale, and returns the merged vector. `scope` (or `trim`) is `"global"`
where a rule looks at the whole vectors at once, or `"tensor"`.
"""

import hashlib
import re
from fnmatch import fnmatchcase

import numpy as np
import torch


def stack(vectors):
    """Return `[N, P]`: one flattened vector a row."""
    return torch.stack(
        [torch.cat([t.double().flatten() for t in v.values()]) for v in vectors]
    )


def unstack(numbers, vector):
    """Return the flat numbers as a dict with the shapes of a vector."""
    parts = numbers.split([t.numel() for t in vector.values()])
    return {n: p.view(t.shape) for (n, t), p in zip(vector.items(), parts)}


def in_scope(rule, vectors, scope):
    """Apply `[N, P] -> [P]` to the whole vectors, or tensor by tensor."""
    if scope == "global":
        return unstack(rule(stack(vectors)), vectors[0])
    merged = {}
    for name, tensor in vectors[0].items():
        taus = torch.stack([v[name].double().flatten() for v in vectors])
        merged[name] = (rule(taus) if taus.numel() else taus[0]).view_as(tensor)
    return merged


def task_arithmetic(vectors, weights=None):
    """Ilharco et al. 2023, section 2: `sum_i w_i tau_i`."""
    weights = torch.tensor(weights or [1.0] * len(vectors)).double()
    return unstack(weights @ stack(vectors), vectors[0])


def linear_average(vectors, weights=None):
    """Wortsman et al. 2022: `sum_i w_i tau_i / sum_i w_i`."""
    weights = torch.tensor(weights or [1.0] * len(vectors)).double()
    return unstack(weights @ stack(vectors) / weights.sum(), vectors[0])


def trim(tau, density):
    """Keep the `round(density * P)` largest magnitudes, earlier ones first."""
    order = tau.abs().argsort(descending=True, stable=True)
    kept = order[: round(density * len(tau))]
    return torch.zeros_like(tau).index_copy(0, kept, tau[kept])


def trim_vectors(vectors, density, scope):
    """Trim each vector, as a whole or tensor by tensor."""
    if not isinstance(density, list):
        density = [density] * len(vectors)
    return [
        in_scope(lambda t, d=d: trim(t[0], d), [vector], scope)
        for vector, d in zip(vectors, density)
    ]


def elect_and_merge(taus, elect="mass", weights=None):
    """Mean of the entries `[N, P]` that have the elected sign.

    TIES, algorithm 1, steps 2 and 3. An undecided entry takes the sign that
    prevails among all others. With weights, `sum w tau / sum w`.
    """
    weights = torch.ones(len(taus)) if weights is None else weights
    weights = torch.as_tensor(weights).double()[:, None]
    taus = taus * weights
    if elect == "mass":
        elected = taus.sum(0).sign()
    else:
        elected = taus.sign().sum(0).sign()
    elected[elected == 0] = elected.sum().sign()
    agree = (taus != 0) & (taus.sign() == elected)
    mass = (weights * agree).sum(0)
    return (taus * agree).sum(0) / mass.where(mass != 0, 1)


def ties(vectors, density=0.2, trim="global", elect="mass", weights=None):
    """Yadav et al. 2023, algorithm 1: trim, elect, disjoint merge."""
    trimmed = stack(trim_vectors(vectors, density, trim))
    return unstack(elect_and_merge(trimmed, elect, weights), vectors[0])


def breadcrumbs(vectors, density=0.14, gamma=0.01, trim="tensor"):
    """Davari and Belilovsky 2023, equations 2 and 3: sum of what lies
    between the outliers (`gamma`) and the negligible entries."""
    kept = stack(trim_vectors(vectors, min(density + gamma, 1), trim))
    outliers = stack(trim_vectors(vectors, gamma, trim))
    return unstack((kept - outliers).sum(0), vectors[0])


def content(vector):
    """Numbers that vectors are put in order by: `sum_j (2 j + 1) bits_j`."""
    sums = []
    for name in sorted(vector):
        bits = (vector[name].float().numpy().reshape(-1) + 0).view(np.uint32)
        odd = 2 * np.arange(len(bits), dtype=np.uint64) + 1
        sums.append(int((bits * odd).sum(dtype=np.uint64)))
    return sums


def uniform(seed, rank, name, numel):
    """Random numbers in [0, 1) of a tensor of the vector with this rank."""
    digest = hashlib.sha256(f"{seed}\0{rank}\0{name}".encode()).digest()
    generator = np.random.Philox(key=int.from_bytes(digest[:16], "little"))
    words = generator.random_raw((numel + 1) // 2).astype("<u8").view("<u4")
    return torch.from_numpy(words[:numel] / 2**32)


def drop(vectors, seed, chances):
    """Drop each entry with its chance `p`, divide the others by `1 - p`."""
    order = sorted(range(len(vectors)), key=lambda i: content(vectors[i]))
    dropped = []
    for index, vector in enumerate(vectors):
        dropped.append({})
        for name, tensor in vector.items():
            p = chances(tensor.double())
            rank = order.index(index)
            kept = uniform(seed, rank, name, tensor.numel()) >= p.flatten()
            dropped[-1][name] = tensor * kept.view_as(tensor) / (1 - p)
    return dropped


def dare(vectors, drop_rate, seed=0, then=task_arithmetic):
    """Yu et al. 2023, equation 3, then another rule."""
    return then(drop(vectors, seed, lambda t: torch.full_like(t, drop_rate)))


def della(vectors, drop_rate=0.7, epsilon=0.2, seed=0, elect="mass"):
    """Deep et al. 2024, section 3: in each row, drop by magnitude rank."""

    def chances(tensor):
        rows = tensor.flatten(1) if tensor.dim() > 1 else tensor.view(1, -1)
        order = rows.abs().argsort(dim=1, descending=True, stable=True)
        ranks, n = order.argsort(dim=1), rows.shape[1]
        return (drop_rate - epsilon / 2 + epsilon / n * ranks).view_as(tensor)

    taus = stack(drop(vectors, seed, chances))
    merged = taus.sum(0) if elect == "none" else elect_and_merge(taus, elect)
    return unstack(merged, vectors[0])


def pcb(vectors, density=0.1):
    """Du et al. 2024, PCB, with the functions of the authors' code."""
    taus = stack(vectors)
    n, d = taus.shape

    def unit(x):
        low, high = x.min(1, keepdim=True)[0], x.max(1, keepdim=True)[0]
        return (x - low) / (high - low)

    ordered = taus.abs().sort(1)[0]
    low, high = int(d * 1e-4), int(d * (1 - 1e-4) - 1)
    size = taus.abs().clip(ordered[:, [low]], ordered[:, [high]])
    score = (n * unit(size) ** 2).exp() * (taus * taus.sum(0)).tanh()
    least = score.sort(1)[0][:, [int(d * (1 - density))]]
    weights = unit(score.maximum(least))
    mass = weights.sum(0)
    merged = (weights * taus.sign() * size).sum(0) / mass.where(mass > 0, 1)
    return unstack(merged, vectors[0])


def sce(vectors, density=1.0):
    """Wan et al. 2024, SCE: select by variance, weigh, erase."""

    def merge(taus):
        if density < 1:
            spread = taus.var(0, unbiased=False)
            kept = int(spread.count_nonzero() * density)
            order = spread.argsort(descending=True, stable=True)[:kept]
            selected = torch.zeros_like(spread).index_fill(0, order, 1)
            taus = taus * selected
        agree = taus.sign() == torch.where(taus.sum(0) >= 0, 1, -1)
        weights = (taus**2).mean(1, keepdim=True) * agree
        mass = weights.sum(0)
        return (weights * taus).sum(0) / mass.where(mass > 0, 1)

    return in_scope(merge, vectors, "tensor")


def slerp(vectors, t, scope="tensor"):
    """Shoemake 1985: from the first vector to the second along their arc."""

    def arc(taus):
        a, b = taus
        cosine = torch.dot(a, b) / (a.norm() * b.norm())
        angle = cosine.clamp(-1, 1).arccos()
        if cosine.isnan() or angle.sin() < 1e-7:
            return (1 - t) * a + t * b
        return (
            ((1 - t) * angle).sin() * a + (t * angle).sin() * b
        ) / angle.sin()

    return in_scope(arc, vectors, scope)


def karcher(vectors, weights=None, scope="tensor", iterations=100):
    """Karcher 1977: mean direction on the sphere, times the mean length.

    Again and again: average the logarithms of the directions (their tangents
    at the present mean) and follow the average along the sphere.
    """
    weights = torch.tensor(weights or [1.0] * len(vectors)).double()

    def mean(taus):
        w, lengths = weights / weights.sum(), taus.norm(dim=1)
        length, some = w @ lengths, lengths > 0
        w, units = w[some], taus[some] / lengths[some, None]
        centre = w @ units
        if not centre.norm() > 1e-7:
            return torch.zeros_like(centre)
        w, centre = w / w.sum(), centre / centre.norm()
        for _ in range(iterations):
            cosines = (units @ centre).clamp(-1, 1)[:, None]
            across = units - cosines * centre
            sines = across.norm(dim=1, keepdim=True).clamp(min=1e-30)
            step = w @ (cosines.arccos() * across / sines)
            size = step.norm()
            if size > 0:
                centre = size.cos() * centre + size.sin() / size * step
                centre = centre / centre.norm()
        return length * centre

    return in_scope(mean, vectors, scope)


def multi_slerp(vectors, weights=None, scope="tensor"):
    """Buss and Fillmore 2001: one step of the Karcher mean."""
    return karcher(vectors, weights, scope, iterations=1)


def model_stock(vectors, scope="tensor"):
    """Jang et al. 2024, equation 3: `t mean`, from the mean angle."""

    def stock(taus):
        n, units = len(taus), torch.nn.functional.normalize(taus, dim=1)
        rows, columns = torch.triu_indices(n, n, offset=1)
        angles = (units @ units.T)[rows, columns].clamp(-1, 1).arccos()
        cosine = angles.mean().cos().clamp(min=0)
        return n * cosine / (1 + (n - 1) * cosine) * taus.mean(0)

    return in_scope(stock, vectors, scope)


def fisher(vectors, fishers):
    """Matena and Raffel 2022, equation 4: `sum F tau / sum F`, by entry."""
    taus, weights = stack(vectors), stack(fishers)
    mass = weights.sum(0)
    weighted = (weights * taus).sum(0) / mass.where(mass > 0, 1)
    return unstack(weighted.where(mass > 0, taus.mean(0)), vectors[0])


def lines(names, alpha, slope):
    """Wang et al. 2024, equation 3: the scale of each parameter.

    `alpha + slope * l / (L - 1)` in layer `l` of a stack of `L` layers; alpha
    for parameters of no layer. A stack is what leads up to the number.
    """
    found = {n: re.match(r"(.*?\blayers\.)(\d+)\b", n) for n in names}
    layers = {n: (m[1], int(m[2])) for n, m in found.items() if m}
    last = {}
    for stack_name, layer in layers.values():
        last[stack_name] = max(layer, last.get(stack_name, 1))
    return {
        n: alpha + slope * layers[n][1] / last[layers[n][0]]
        if n in layers
        else alpha
        for n in names
    }


def selective_attention(vectors, mix, alpha=0.2):
    """Shankar et al. 2025: `mix^(alpha (i + 1) / L)` of the first vector's
    queries, keys and values in layer `i` of `L`, the rest of the second's."""
    pattern = r"(.*?\blayers\.)(\d+)\b.*(q_proj|k_proj|v_proj|in_proj_)"
    found = {n: re.match(pattern, n) for n in vectors[0]}
    layers = {n: re.match(r"(.*?\blayers\.)(\d+)\b", n) for n in vectors[0]}
    merged = {}
    for name, match in found.items():
        first, second = (v[name].double() for v in vectors)
        merged[name] = first
        if match:
            same = [m for m in layers.values() if m and m[1] == match[1]]
            last = max(int(m[2]) for m in same)
            share = mix ** (alpha * (int(match[2]) + 1) / (last + 1))
            merged[name] = share * first + (1 - share) * second
    return merged


def by_layer(vectors, rules):
    """Another rule for each group, `{pattern: rule}`; the first match wins."""
    merged = {}
    for pattern, rule in rules.items():
        names = [n for n in vectors[0] if fnmatchcase(n, pattern)]
        names = [n for n in names if n not in merged]
        merged.update(rule([{n: v[n] for n in names} for v in vectors]))
    return {n: merged[n] for n in vectors[0]}


def by_matrix(rule, vectors):
    """Apply a rule to matrices; kernels become some, all else is averaged."""
    merged = {}
    for name, tensor in vectors[0].items():
        taus = [v[name].double() for v in vectors]
        rows = len(tensor) if tensor.dim() > 1 else 1
        if rows > 1 and tensor.numel() > rows:
            taus = [tau.view(rows, -1) for tau in taus]
            merged[name] = rule(taus).view_as(tensor)
        else:
            merged[name] = sum(taus) / len(taus)
    return merged


def svd(tau, rank=None, of=None):
    """Singular triples of a matrix that are more than float32's rounding.

    Rounding `of` another matrix, where it was computed from one.
    """
    u, s, v = torch.linalg.svd(tau, full_matrices=False)
    size = (tau if of is None else of).norm() * max(tau.shape) ** 0.5
    found = int((s > 4 * 2**-23 * size).sum())
    kept = found if rank is None else min(rank, found)
    return u[:, :kept], s[:kept], v[:kept]


def orthonormal(matrix):
    """The orthonormal matrix nearest to one: `P Q^T` of `P D Q^T`.

    Without the directions that the matrix does not span (`D` near 0).
    """
    left, size, right = torch.linalg.svd(matrix, full_matrices=False)
    rank = int((size > 3.5e-4 * size[0]).sum())
    return left[:, :rank] @ right[:rank]


def tsv_m(vectors, share=None, boost=lambda s: s):
    """Gargiulo et al. 2025, algorithm 1: top singular triples, decorrelated."""

    def merge(taus):
        kept = int(min(taus[0].shape) * (share or 1 / len(taus)) + 1e-9)
        u, s, v = zip(*map(svd, taus))
        left = orthonormal(torch.cat([part[:, :kept] for part in u], 1))
        right = orthonormal(torch.cat([part[:kept] for part in v]))
        return left * torch.cat([boost(part)[:kept] for part in s]) @ right

    return by_matrix(merge, vectors)


def boosted_tsv_m(vectors, beta=0.3, share=None):
    """Carvalho et al. 2026: singular values raised to the one at which the
    cumulated ones reach the share `beta`, then TSV-M."""

    def boost(s):
        reached = s.cumsum(0) / s.sum() >= beta
        return s.clamp(min=s[reached][0])

    return tsv_m(vectors, share, boost)


def iso_c(vectors):
    """Marczak et al. 2025, algorithm 1: the sum, with a flat spectrum."""

    def merge(taus):
        left, values, right = svd(sum(taus))
        return left @ right * values.mean()

    return by_matrix(merge, vectors)


def iso_cts(vectors, common=0.8):
    """Marczak et al. 2025, Iso-CTS: common and task-specific subspaces."""

    def merge(taus):
        full = min(taus[0].shape)
        each = round((full - int(full * common + 1e-9)) / len(taus))
        each = min(each, full // len(taus))
        triples = [svd(sum(taus), full - each * len(taus))]
        shared = triples[0][0]
        for tau in taus:
            triples.append(svd(tau - shared @ shared.T @ tau, each, tau))
        u, s, v = zip(*triples)
        left, right = orthonormal(torch.cat(u, 1)), orthonormal(torch.cat(v))
        return left @ right * torch.cat(s).mean()

    return by_matrix(merge, vectors)
