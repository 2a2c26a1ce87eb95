"""Stock models of transformers with our attention: equal to the original where ours is softmax or sees everything."""

import copy
import json

import pytest
import torch

transformers = pytest.importorskip("transformers")

from apps.summarization.abstractive import Document  # noqa: E402
from apps.summarization.conversion import convert, grow_positions, load_stock  # noqa: E402
from apps.summarization.decoding import Speed  # noqa: E402
from apps.summarization.recipe import PredictSection  # noqa: E402
from apps.summarization.stock import StockWriter  # noqa: E402
from apps.summarization.transformers_attention import ATTRIBUTE, use_attention  # noqa: E402
from core.training.errors import UserError  # noqa: E402

SIZES = {"vocab_size": 60, "pad_token_id": 1, "eos_token_id": 2, "bos_token_id": 0}
BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
}


def stock(family):
    torch.manual_seed(0)
    if family in ("bart", "pegasus"):
        made = {"bart": transformers.BartConfig, "pegasus": transformers.PegasusConfig}[family]
        config = made(**SIZES, **BART, max_position_embeddings=64)
    elif family == "led":
        config = transformers.LEDConfig(
            **SIZES, **BART, max_encoder_position_embeddings=96, max_decoder_position_embeddings=64, attention_window=40
        )
    else:
        t5 = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 1}
        config = transformers.T5Config(**SIZES, **t5)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1 and weight.requires_grad:
                weight.mul_(4.0 if weight.std() < 0.1 else 1.5)  # so that attention is far from uniform
    return model


@pytest.fixture(scope="module")
def inputs():
    torch.manual_seed(1)
    ids = torch.randint(3, 60, (2, 40))
    mask = torch.ones_like(ids)
    mask[1, 31:] = 0
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": torch.randint(3, 60, (2, 7))}


def logits(model, inputs):
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("attention", [{"variant": "softmax"}, {"variant": "window", "window": 40}], ids=str)
@pytest.mark.parametrize("family", ["bart", "t5", "led", "pegasus"])
def test_outputs_are_the_originals_where_all_is_seen(family, attention, inputs):
    model = stock(family)
    given = dict(inputs)
    if family == "led":
        given["global_attention_mask"] = global_mask(inputs)
        wide_window(model, 40)  # its own window of 40 tokens is 20 to each side: let it see everything, too
    want = logits(model, given)
    summary = {key: given[key] for key in given if key != "decoder_input_ids"}
    written = model.generate(**summary, num_beams=3, max_new_tokens=8)
    changed = copy.deepcopy(model)
    if family == "t5" and attention["variant"] == "window":
        with pytest.raises(ValueError, match="drop_bias"):
            convert(changed, attention)
        return
    convert(changed, attention, length=200)
    torch.testing.assert_close(logits(changed, given), want, atol=1e-5, rtol=1e-5)
    assert torch.equal(changed.generate(**summary, num_beams=3, max_new_tokens=8), written)
    other = convert(copy.deepcopy(model), {"variant": "linear"}, drop_bias=True)
    assert (logits(other, given) - want).abs().max() > 1e-3, "the outputs do not depend on the attention"


def global_mask(inputs):
    """The first token of both documents, and another in the second."""
    marked = torch.zeros_like(inputs["input_ids"])
    marked[:, 0] = 1
    marked[1, 25] = 1
    return marked


def wide_window(led, each_side):
    led.config.attention_window = [2 * each_side] * 2
    for layer in led.get_encoder().layers:
        layer.self_attn.longformer_self_attn.one_sided_attn_window_size = each_side


def test_led_with_its_own_window_and_global_tokens_is_led(inputs):
    model = stock("led")
    wide_window(model, 5)
    given = inputs | {"global_attention_mask": global_mask(inputs)}
    want, without = logits(model, given), logits(model, inputs)
    changed = convert(model, {"variant": "window", "window": 6})
    torch.testing.assert_close(logits(changed, given), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits(changed, inputs), without, atol=1e-5, rtol=1e-5)
    assert (want - without).abs().max() > 1e-3, "global tokens make no difference"


@pytest.mark.parametrize("variant", ["window", "hybrid", "linear"])
def test_global_tokens_of_led_reach_far_and_receive_a_gradient(variant, inputs):
    options = {} if variant == "linear" else {"window": 4}
    encoder = convert(stock("led"), {"variant": variant, **options}).get_encoder()
    embedded = encoder.embed_tokens(inputs["input_ids"][:1]).detach().requires_grad_()
    wide = torch.zeros(1, 40, dtype=torch.int64)
    wide[0, 20] = 1
    out = encoder(inputs_embeds=embedded, global_attention_mask=wide).last_hidden_state
    out[0, 39, 0].backward()
    assert embedded.grad[0, 20].abs().sum() > 1e-4
    attention = encoder.layers[0].self_attn.longformer_self_attn
    for name in ("query_global", "key_global", "value_global"):
        assert getattr(attention, name).weight.grad.abs().sum() > 0, name


@pytest.mark.parametrize("family", ["bart", "t5", "led", "pegasus"])
def test_cross_attention_becomes_hepos(family, inputs):
    model = stock(family)
    want = logits(model, inputs)
    own = {"variant": "window", "window": 21} if family == "led" else {"variant": "softmax"}
    one = convert(copy.deepcopy(model), own, cross={"variant": "hepos", "stride": 1})
    torch.testing.assert_close(logits(one, inputs), want, atol=1e-4, rtol=1e-4)
    two = convert(copy.deepcopy(model), own, cross={"variant": "hepos", "stride": 2})
    assert (logits(two, inputs) - want).abs().max() > 1e-3
    source = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    cached = two.generate(**source, max_new_tokens=6, use_cache=True)
    assert torch.equal(cached, two.generate(**source, max_new_tokens=6, use_cache=False))


def test_what_cannot_be_converted_is_refused():
    with pytest.raises(ValueError, match="global tokens of its own"):
        convert(stock("led"), {"variant": "longformer"})
    with pytest.raises(ValueError, match=r"'gla' cannot do 'bidirectional'|reads the layer's input"):
        convert(stock("led"), {"variant": "gla"})
    with pytest.raises(ValueError, match="'window' cannot do 'cross'"):
        convert(stock("led"), {"variant": "softmax"}, cross={"variant": "window"})
    with pytest.raises(ValueError, match=r"'gla' cannot do 'bidirectional'|reads the layer's input"):
        convert(stock("bart"), {"variant": "gla"})


def test_the_sinusoids_of_pegasus_go_on():
    encoder = stock("pegasus").get_encoder()
    before = encoder.embed_positions.weight.detach().clone()
    grow_positions(encoder, 150)
    after = encoder.embed_positions.weight
    torch.testing.assert_close(after[:64], before)
    assert (after[64:128] - before).abs().max() > 0.1, "repeated"


def test_the_position_table_grows_by_repetition_and_is_never_cut():
    encoder = stock("bart").get_encoder()
    before = encoder.embed_positions.weight.detach().clone()
    grow_positions(encoder, 150)
    after = encoder.embed_positions.weight
    assert torch.equal(after[:66], before)
    assert torch.equal(after[66:130], before[2:])
    assert len(after) == 152
    with pytest.raises(ValueError, match="150 rows, more than the 64"):
        grow_positions(encoder, 64)
    text = torch.randint(3, 60, (1, 150))
    assert encoder(input_ids=text).last_hidden_state.shape == (1, 150, 32)


@pytest.fixture
def llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=1,
    )
    return transformers.LlamaForCausalLM(config).eval()


def test_a_decoder_only_model_stays_itself_with_softmax(llama, inputs):
    given = {key: inputs[key] for key in ("input_ids", "attention_mask")}
    want = logits(llama, given)
    written = llama.generate(given["input_ids"][:1], max_new_tokens=6, do_sample=False)
    assert use_attention(llama, "softmax") == 2
    real = given["attention_mask"].bool()
    torch.testing.assert_close(logits(llama, given)[real], want[real], atol=1e-5, rtol=1e-4)
    assert torch.equal(llama.generate(given["input_ids"][:1], max_new_tokens=6, do_sample=False), written)


@pytest.mark.parametrize("variant", ["softmax", "linear", "hybrid", "window"])
def test_causality_and_padding_reach_our_attention(llama, inputs, variant):
    use_attention(llama, variant, **({"window": 8} if variant in ("hybrid", "window") else {}))
    ids = inputs["input_ids"][:1]
    changed = ids.clone()
    changed[0, 30] = 3 if ids[0, 30] != 3 else 4
    before, after = (logits(llama, {"input_ids": x}) for x in (ids, changed))
    assert torch.equal(before[0, :30], after[0, :30])
    assert (before[0, 30:] - after[0, 30:]).abs().max() > 1e-4
    padded = {"input_ids": torch.cat([ids[:, :30], torch.full((1, 5), 9)], 1)}
    mask = torch.ones(1, 35, dtype=torch.int64)
    mask[0, 30:] = 0
    short = logits(llama, {"input_ids": ids[:, :30]})
    torch.testing.assert_close(logits(llama, {**padded, "attention_mask": mask})[:, :30], short, atol=1e-5, rtol=1e-4)


def test_the_choice_is_on_every_module_and_weights_of_a_map_are_trained(llama, inputs):
    use_attention(llama, "linear", feature_map="hedgehog")
    learned = [name for name, _ in llama.named_parameters() if ATTRIBUTE in name]
    assert learned
    llama(input_ids=inputs["input_ids"]).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in llama.named_parameters() if ATTRIBUTE in n)


def test_a_model_that_wants_a_window_of_its_own_is_told(inputs):
    config = transformers.MistralConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    model = transformers.MistralForCausalLM(config).eval()
    use_attention(model, "linear")
    with pytest.raises(ValueError, match=r"causal and padding masks|sliding_window"):
        model(input_ids=inputs["input_ids"])


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {f"w{i}": i for i in range(3, 60)} | {"<s>": 0, "<pad>": 1, "</s>": 2}
    inner = Tokenizer(models.WordLevel(words, unk_token="w3"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return inner


@pytest.mark.parametrize("family", ["bart", "t5", "led"])
def test_a_checkpoint_folder_trains_predicts_and_comes_back(family, tmp_path, write_rows):
    from core.training.fit import fit
    from core.training.predict import inspect, predict
    from core.training.recipe import load_recipe
    from core.training.run import load_run

    folder = tmp_path / "stock"
    stock(family).save_pretrained(folder)
    tokenizer().save(str(folder / "tokenizer.json"))
    given = [
        {"id": str(i), "document": f"w{5 + i} w9 w10. w{20 + i} w4 w8 w7.", "summary": f"w{5 + i} w4"}
        for i in range(12)
    ]
    path = write_rows(tmp_path / "own.jsonl", given)
    overrides = [
        f"data.train={path}",
        f"model.checkpoint={folder}",
        "model.cross={variant: hepos, stride: 2}",
        "data.max_tokens=80",
        "model.max_summary=8",
        "trainer.max_steps=2",
        "trainer.batch_size=4",
        "trainer.accelerator=cpu",
    ]
    attention = ["attention=softmax"] if family == "t5" else ["attention=hybrid"]
    if family == "led":
        attention += ["model.global_tokens=separators", "data.max_tokens=94", "backbone.checkpoint=true"]
    fit(load_recipe("summarization/checkpoint", [*overrides, *attention]), run_dir=tmp_path / "run", quiet=True)
    loaded = load_run(tmp_path / "run")
    assert loaded.spec["tokenizer"]["kind"] == "checkpoint"
    recomputed = any(getattr(m, "gradient_checkpointing", False) for m in loaded.task.model.inner.modules())
    assert recomputed == (family == "led")
    before = predict(tmp_path / "run", path, tmp_path / "a.jsonl")
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    after = predict(tmp_path / "run", path, tmp_path / "b.jsonl")
    rows = [[json.loads(line) for line in file[0].read_text().splitlines()] for file in (before, after)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 12
    _, table = inspect(tmp_path / "run", path, tmp_path / "inside")
    for line in table.read_text().splitlines():
        assert max(json.loads(line)["attribution"]) > 0


def test_a_folder_that_is_no_checkpoint_is_named(tmp_path):
    with pytest.raises(UserError, match=r"holds no config.json"):
        load_stock(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match=r"holds no tokenizer.json"):
        load_stock(tmp_path)
    tokenizer().save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="is a 'bert' model; known: bart"):
        load_stock(tmp_path)


@pytest.mark.parametrize(
    "options",
    [
        {"decoding": "beam", "beams": 3, "length_penalty": 2.0, "no_repeat_ngram": 1},
        {"decoding": "sample", "seed": 3, "top_k": 20, "top_p": 0.9},
    ],
    ids=lambda options: options["decoding"],
)
@pytest.mark.parametrize("family", ["bart", "led"])
def test_a_converted_checkpoint_writes_with_a_cache_as_without(family, options):
    inner = convert(stock(family), {"variant": "window", "window": 8}, cross={"variant": "hepos", "stride": 2})
    model, document = StockWriter(inner), Document(torch.randint(5, 60, (2, 30)))
    before, how = torch.get_rng_state(), PredictSection.model_validate(options | {"min_tokens": 4})
    speed = Speed()
    first, again, plain = (model.write(document, how, 8, speed, cached=cached) for cached in (True, True, False))
    assert [one.tokens for one in first] == [one.tokens for one in again] == [one.tokens for one in plain]
    assert torch.equal(torch.get_rng_state(), before), "the draws of a summary touch those of training"
    assert speed.state_bytes >= 2 * 2 * 4 * (30 + 4) * 32, "keys and values of two layers, own and across"


def test_led_is_told_its_global_tokens():
    marked = torch.zeros(2, 6, dtype=torch.bool)
    marked[0, 3] = True
    ids = torch.full((2, 6), 20)
    ids[1, 4:] = 0
    given = StockWriter(stock("led")).source(Document(ids, None, marked))
    assert given["global_attention_mask"].tolist() == [[1, 0, 0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0, 0]]
    assert given["attention_mask"].sum(dim=1).tolist() == [8, 6]
    assert "global_attention_mask" not in StockWriter(stock("bart")).source(Document(ids, None, marked))
