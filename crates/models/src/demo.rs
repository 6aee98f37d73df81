//! A gpt-oss model without a download: random weights from a fixed seed, made in memory.
//!
//! It knows nothing and says nothing sensible; it is there to try the server with, at any speed of machine. Its blocks
//! are random through and through. Three things are put into the head by hand, or its answers would be hard to look at:
//! it ends its turn after about sixty tokens on average at temperature 1, it avoids the ids it is told to, and it
//! follows a few ids by a given one, so that it can open a message as a chat format wants it.

use ctxserve_checkpoint::{Checkpoint, CheckpointError, Dtype, MemoryTensor};
use ctxserve_core::{MXFP4_BLOCK, TokenId};
use half::bf16;
use serde_json::{Value, json};

const HIDDEN: usize = 128;
const INNER: usize = 64;
const LAYERS: usize = 2;
const HEADS: usize = 2;
const KV_HEADS: usize = 1;
const HEAD_DIM: usize = 64;
const EXPERTS: usize = 8;

/// The residual stream's first element holds this in every token and block: a handle by which the head can favour ids.
const CONSTANT: f32 = 4.0;
/// About the root mean square of the residual stream before the head: what the last norm divides by.
const RMS: f32 = 1.25;
/// Standard deviation of the logits.
const SPREAD: f32 = 2.0;
/// Logit taken from an id to avoid.
const AVOID: f32 = -14.0;
/// Logit given to an id that follows another; above what it loses when it is also avoided.
const FOLLOW: f32 = 32.0;
/// Mean length of an answer.
const TURN: f32 = 64.0;

/// What the demo model must know of its tokenizer.
#[derive(Clone, Debug, Default)]
pub struct DemoSpec {
    /// Same seed, same weights.
    pub seed: u64,
    /// Highest id of the tokenizer + 1.
    pub vocab_size: usize,
    /// Ids that end its turn; the first is the one it uses.
    pub eos: Vec<TokenId>,
    /// Ids it should not say, except where `follows` asks for them.
    pub avoids: Vec<TokenId>,
    /// Pairs of an id and the one that should come next.
    pub follows: Vec<(TokenId, TokenId)>,
}

/// Makes the model: about 0.5 MB and two bytes per vocabulary entry and width. Ids outside the vocabulary are ignored.
///
/// # Errors
/// None that a sensible vocabulary size could cause: the checkpoint rules are those of files.
pub fn checkpoint(spec: &DemoSpec) -> Result<Checkpoint, CheckpointError> {
    let mut random = Random(spec.seed);
    let mut tensors = Tensors::default();
    let (q, kv) = (HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM);
    let embedding = embedding(&mut random, spec.vocab_size);
    let head = head(&mut random, spec, &embedding);
    tensors.dense("model.embed_tokens.weight", &[spec.vocab_size, HIDDEN], &embedding);
    tensors.dense("lm_head.weight", &[spec.vocab_size, HIDDEN], &head);
    tensors.dense("model.norm.weight", &[HIDDEN], &[1.0; HIDDEN]);
    for layer in 0..LAYERS {
        let name = |name: &str| format!("model.layers.{layer}.{name}");
        for norm in ["input_layernorm.weight", "post_attention_layernorm.weight"] {
            tensors.dense(&name(norm), &[HIDDEN], &[1.0; HIDDEN]);
        }
        for (linear, rows) in [("q", q), ("k", kv), ("v", kv)] {
            let weight = random.normals(rows * HIDDEN, 0.1);
            tensors.dense(&name(&format!("self_attn.{linear}_proj.weight")), &[rows, HIDDEN], &weight);
            tensors.dense(
                &name(&format!("self_attn.{linear}_proj.bias")),
                &[rows],
                &random.normals(rows, 0.1),
            );
        }
        let mut output = random.normals(HIDDEN * q, 0.05);
        output[..q].fill(0.0);
        tensors.dense(&name("self_attn.o_proj.weight"), &[HIDDEN, q], &output);
        tensors.dense(&name("self_attn.o_proj.bias"), &[HIDDEN], &[0.0; HIDDEN]);
        tensors.dense(&name("self_attn.sinks"), &[HEADS], &random.normals(HEADS, 1.0));
        tensors.dense(&name("mlp.router.weight"), &[EXPERTS, HIDDEN], &random.normals(EXPERTS * HIDDEN, 0.1));
        tensors.dense(&name("mlp.router.bias"), &[EXPERTS], &random.normals(EXPERTS, 0.1));
        tensors.experts(&name("mlp.experts.gate_up_proj"), 2 * INNER, HIDDEN, &mut random, false);
        tensors.experts(&name("mlp.experts.down_proj"), HIDDEN, INNER, &mut random, true);
    }
    Checkpoint::in_memory(config(spec), tensors.0)
}

fn config(spec: &DemoSpec) -> Value {
    json!({
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "vocab_size": spec.vocab_size,
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 4,
        "attention_bias": true,
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"],
        "swiglu_limit": 7.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": false,
        "max_position_embeddings": 16_384,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150_000,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": false,
            "original_max_position_embeddings": 4096,
        },
        "eos_token_id": spec.eos,
        "quantization_config": { "quant_method": "mxfp4" },
    })
}

/// `[vocab, HIDDEN]`, unit variance, the first column constant.
fn embedding(random: &mut Random, vocab: usize) -> Vec<f32> {
    let mut table = random.normals(vocab * HIDDEN, 1.0);
    table.iter_mut().step_by(HIDDEN).for_each(|first| *first = CONSTANT);
    table
}

/// `[vocab, HIDDEN]`: random, plus the three things put in by hand.
fn head(random: &mut Random, spec: &DemoSpec, embedding: &[f32]) -> Vec<f32> {
    let width = (HIDDEN - 1) as f32;
    let mut table = random.normals(spec.vocab_size * HIDDEN, SPREAD * RMS / width.sqrt());
    table.iter_mut().step_by(HIDDEN).for_each(|first| *first = 0.0);
    let row = |id: TokenId| {
        let start = id as usize * HIDDEN;
        ((id as usize) < spec.vocab_size).then_some(start..start + HIDDEN)
    };
    let per_logit = RMS / CONSTANT;
    for &id in &spec.avoids {
        if let Some(row) = row(id) {
            table[row][0] = AVOID * per_logit;
        }
    }
    if let Some(row) = spec.eos.first().and_then(|&id| row(id)) {
        // Without other structure the sum over the vocabulary of exp(logit) is about vocab * exp(SPREAD^2 / 2).
        let total = (spec.vocab_size as f32).ln() + SPREAD * SPREAD / 2.0;
        table[row.clone()].fill(0.0);
        table[row][0] = (total - TURN.ln()) * per_logit;
    }
    for &(before, after) in &spec.follows {
        let (Some(from), Some(to)) = (row(before), row(after)) else { continue };
        // The residual stream still holds the embedding of the id that came in.
        for (weight, &was) in table[to].iter_mut().zip(&embedding[from]).skip(1) {
            *weight += was * FOLLOW * RMS / width;
        }
    }
    table
}

#[derive(Default)]
struct Tensors(Vec<MemoryTensor>);

impl Tensors {
    fn push(&mut self, name: String, dtype: Dtype, shape: &[usize], data: Vec<u8>) {
        self.0.push(MemoryTensor { name, dtype, shape: shape.to_vec(), data });
    }

    fn dense(&mut self, name: &str, shape: &[usize], values: &[f32]) {
        let data = values.iter().flat_map(|&value| bf16::from_f32(value).to_le_bytes()).collect();
        self.push(name.to_owned(), Dtype::BF16, shape, data);
    }

    /// Random MXFP4 experts and zero biases; `zero_first` makes the first output zero.
    fn experts(&mut self, name: &str, rows: usize, cols: usize, random: &mut Random, zero_first: bool) {
        let mut codes: Vec<u8> = (0..EXPERTS * rows * cols / 2).map(|_| random.next() as u8).collect();
        if zero_first {
            codes.chunks_mut(rows * cols / 2).for_each(|expert| expert[..cols / 2].fill(0));
        }
        let blocks = cols / MXFP4_BLOCK;
        let scales = (0..EXPERTS * rows * blocks).map(|_| 120 + (random.next() % 3) as u8).collect();
        self.push(format!("{name}_blocks"), Dtype::U8, &[EXPERTS, rows, blocks, MXFP4_BLOCK / 2], codes);
        self.push(format!("{name}_scales"), Dtype::U8, &[EXPERTS, rows, blocks], scales);
        self.dense(&format!("{name}_bias"), &[EXPERTS, rows], &vec![0.0; EXPERTS * rows]);
    }
}

/// SplitMix64: the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Nearly normal: the sum of four uniform 16-bit numbers, which needs no function that a libm rounds its own way.
    fn normals(&mut self, count: usize, std: f32) -> Vec<f32> {
        let normal = |bits: u64| {
            let sum: u32 = (0..4).map(|i| (bits >> (16 * i)) as u32 & 0xFFFF).sum();
            // The sum has mean 4 * 32767.5 and variance 4 * 65536^2 / 12.
            (sum as f32 - 131_070.0) / (65_536.0 / 3.0_f32.sqrt())
        };
        (0..count).map(|_| normal(self.next()) * std).collect()
    }
}
