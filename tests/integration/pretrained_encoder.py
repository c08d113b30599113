"""A recipe with a pre-trained encoder, changed as its README says."""

import re
import shutil


def tiny_hubert(folder):
    """Save a HuBERT of some hundred parameters, as a folder of transformers."""
    import transformers

    config = transformers.HubertConfig(
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(40, 8),
        conv_kernel=(40, 8),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        mask_time_prob=0.0,
    )
    transformers.HubertModel(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)


def with_hubert(recipe, copy, hparams, source, width):
    """Copy a recipe, and change it by its README's block on HuBERT.

    Arguments
    ---------
    recipe : Recipe
        As it is.
    copy : pathlib.Path
        Where the copy goes; `recipe.folder` leads there afterwards.
    hparams : str
        The file that the block belongs in.
    source : pathlib.Path
        The encoder's folder.
    width : int
        Of its output.
    """
    examples = {
        "/path/to/hubert-base-ls960": source,
        "/path/to/cache": copy / "cache",
        "d_encoder: 768": f"d_encoder: {width}",
    }
    shutil.copytree(recipe.folder, copy)
    readme = (copy / "README.md").read_text(encoding="utf-8")
    section = readme.split("HuBERT as acoustic encoder\n", 1)[1]
    found = re.search(r"```yaml\n(.*?)```", section, re.S)[1]
    said = section.split("```yaml", 1)[0]
    path = copy / hparams
    text = path.read_text(encoding="utf-8")
    gone = re.findall(r"`([A-Z]\w+)`", said)
    assert gone == ["CNN", "Transformer"]
    for key in (*gone, *re.findall(r"^(\w+):", found, re.M)):
        block = rf"^{key}:.*\n(?:[ ]+\S.*\n)*"
        text, count = re.subn(block, "", text, flags=re.M)
        assert count <= 1, key
    for example, own in examples.items():
        assert example in found, example
        found = found.replace(example, str(own))
    path.write_text(f"{text}\n{found}", encoding="utf-8")
    recipe.folder = copy
