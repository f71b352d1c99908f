"""Text encoders and encoder-decoders."""

from __future__ import annotations

from lora_plugins.builtin.architectures.families import FC, GATED, QKV_OUT, QKVO, QV, family, single

__all__ = ["ARCHITECTURES"]


_BERT_MLP = ("intermediate.dense", "output.dense")

ARCHITECTURES = [
    # -- encoders ------------------------------------------------------------------------------
    *family(
        """
        bert bert-generation big_bird bros camembert convbert data2vec-text electra ernie esm layoutlm layoutlmv2
        layoutlmv3 lilt luke markuplm megatron-bert mobilebert mra nystromformer rembert roberta
        roberta-prelayernorm roc_bert roformer splinter tapas xlm-roberta xlm-roberta-xl xmod yoso
        """,
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        _BERT_MLP,
    ),
    *family(
        "longformer",
        ("query", "value", "query_global", "value_global"),
        ("query", "key", "value", "query_global", "key_global", "value_global", "attention.output.dense"),
        _BERT_MLP,
        # A head that reads only the first token, which attends globally, does not reach the last layer's local
        # projections; a batch without global tokens reaches no global projection.
        unreached=("query", "value", "query_global", "value_global"),
    ),
    *family(
        "canine",
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        _BERT_MLP,
        # Only heads that label single characters run it.
        unreached=("final_char_encoder",),
    ),
    *family("esmc", QV, (*QKVO, "out_proj"), GATED),
    *family("albert", ("query", "value"), ("query", "key", "value", "attention.dense"), ("ffn", "ffn_output")),
    *family("mpnet", ("attn.q", "attn.v"), ("attn.q", "attn.k", "attn.v", "attn.o"), _BERT_MLP),
    *family("distilbert", ("q_lin", "v_lin"), ("q_lin", "k_lin", "v_lin", "out_lin"), ("lin1", "lin2")),
    # Attention and feed-forward layers stand in two lists side by side.
    *family(
        "flaubert xlm", ("q_lin", "v_lin", "lin1", "lin2"), ("q_lin", "k_lin", "v_lin", "out_lin"), ("lin1", "lin2")
    ),
    *family("deberta", ("in_proj",), ("in_proj", "attention.output.dense"), _BERT_MLP),
    *family(
        "deberta-v2",
        ("query_proj", "value_proj"),
        ("query_proj", "key_proj", "value_proj", "attention.output.dense"),
        _BERT_MLP,
    ),
    *family("modernbert", ("Wqkv",), ("Wqkv", "attn.Wo"), ("Wi", "mlp.Wo")),
    *family("funnel", ("q_head", "v_head"), ("q_head", "k_head", "v_head", "post_proj"), ("linear_1", "linear_2")),
    # Fourier transforms in place of attention: the feed-forward part is what can be adapted.
    *single("fnet", _BERT_MLP, scopes={"mlp": _BERT_MLP}),
    # Everything is a convolution of width 1; those of the projections are grouped.
    *single("squeezebert", ("post_attention.conv1d",)),
    *family(
        "reformer",
        ("query", "query_key", "value"),
        ("query", "key", "query_key", "value", "attention.output.dense"),
        ("feed_forward.dense.dense", "feed_forward.output.dense"),
        input_gradients=True,
    ),
    *family(
        "perceiver",
        ("query", "value"),
        ("query", "key", "value", "attention.output.dense"),
        ("mlp.dense1", "mlp.dense2"),
        # Its decoder is the head: each task has its own.
        heads=("perceiver.decoder",),
    ),
    # -- encoder-decoders ----------------------------------------------------------------------
    *family(
        "bart blenderbot blenderbot-small fsmt m2m_100 marian mbart mvp nllb-moe pegasus pegasus_x plbart trocr",
        QV,
        QKV_OUT,
        FC,
        experts=("ffn.experts",),
        never=("router",),
    ),
    *family(
        "bigbird_pegasus led",
        ("query", "value", *QV),
        ("query", "key", "value", "self_attn.output", *QKV_OUT),
        FC,
    ),
    *family(
        "prophetnet",
        ("query_proj", "value_proj"),
        ("query_proj", "key_proj", "value_proj", "out_proj"),
        ("feed_forward.intermediate", "feed_forward.output"),
    ),
    *family(
        "t5 mt5 umt5 longt5 pop2piano udop switch_transformers",
        ("q", "v"),
        ("q", "k", "v", "o"),
        ("wi", "wi_0", "wi_1", "wo"),
        experts=("mlp.experts",),
        never=("router",),
    ),
    *single("encoder-decoder", ("query", "value"), inner=("encoder", "decoder")),
]
