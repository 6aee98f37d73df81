//! What a step reads and multiplies, from shapes alone: the yardstick for measured speed.

use crate::ModelInfo;

/// Sizes of a model's weights by how a step uses them. Bytes are those of the checkpoint: a backend that stores
/// weights wider or narrower moves more or less.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Costs {
    /// Bytes that every decode step reads whatever its tokens: everything but the experts, and but the embedding, of
    /// which a token reads one row, unless it is the head too.
    pub shared_bytes: u64,
    /// Bytes of one expert of one layer.
    pub expert_bytes: u64,
    /// Experts of a layer; 0 where the model has none.
    pub experts: usize,
    /// Of those, how many a token goes through.
    pub top_k: usize,
    /// Parameters of all layers that every token is multiplied with, experts not counted.
    pub shared_parameters: u64,
    /// Parameters of one expert of one layer.
    pub expert_parameters: u64,
    /// Parameters that only tokens with logits are multiplied with.
    pub head_parameters: u64,
    /// Width of all query heads of a layer together.
    pub query_width: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Width of an expert between its two products.
    pub inner: usize,
}

/// Distinct experts that a layer of `experts` is expected to use for `tokens` tokens of `top_k` experts each, if the
/// router favours none: `E * (1 - (1 - k / E)^tokens)`.
pub fn expected_experts(experts: usize, top_k: usize, tokens: usize) -> f64 {
    if experts == 0 {
        return 0.0;
    }
    let (all, missed) = (experts as f64, 1.0 - top_k as f64 / experts as f64);
    all * (1.0 - missed.powf(tokens as f64))
}

impl ModelInfo {
    /// Bytes that a decode step of `batch` sequences is expected to read at least: weights once, and the keys and
    /// values that each sequence sees at a length of `context` tokens. Activations stay in caches and are not counted.
    pub fn decode_bytes(&self, batch: usize, context: usize) -> f64 {
        let costs = &self.costs;
        let touched = expected_experts(costs.experts, costs.top_k, batch) * self.layers as f64;
        let weights = costs.shared_bytes as f64 + touched * costs.expert_bytes as f64;
        let visible = |window: Option<usize>| window.map_or(context, |window| context.min(window));
        let groups = self.kv.groups.iter().enumerate();
        let kv = groups.map(|(g, group)| visible(group.window) * self.kv.page_bytes(g) / self.kv.page_size);
        weights + batch as f64 * kv.sum::<usize>() as f64
    }

    /// Floating-point operations of the prefill of one prompt with its first answer token: two for each parameter that
    /// a token meets, and attention over what each position sees.
    pub fn prefill_flops(&self, prompt: usize) -> f64 {
        let costs = &self.costs;
        let experts = self.layers * costs.experts.min(costs.top_k);
        let active = costs.shared_parameters as f64 + experts as f64 * costs.expert_parameters as f64;
        let pairs = |window: Option<usize>| {
            let full = window.map_or(prompt, |window| prompt.min(window)) as f64;
            full * (full + 1.0) / 2.0 + (prompt as f64 - full) * full
        };
        let groups = self.kv.groups.iter();
        let pairs: f64 = groups.map(|group| pairs(group.window) * group.layers.len() as f64).sum();
        // A query meets a key in one product and its value in another.
        let attention = 4.0 * costs.query_width as f64 * pairs;
        2.0 * (active * prompt as f64 + costs.head_parameters as f64) + attention
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::demo::{DemoSpec, checkpoint};
    use crate::{LoadOptions, inspect};

    /// 8 experts of which a token takes 4; one layer sees 128 positions, the other all.
    fn demo() -> ModelInfo {
        let spec = DemoSpec { vocab_size: 1000, ..DemoSpec::default() };
        inspect(&checkpoint(&spec).unwrap(), &LoadOptions::default()).unwrap()
    }

    /// gpt-oss-20b's weights; the layers' attention is the demo's.
    fn twenty_billion() -> ModelInfo {
        let (hidden, inner, vocab) = (2880, 2880, 201_088);
        let attention = (4096 + 2 * 512) * hidden + hidden * 4096 + 32 * hidden;
        let expert = 3 * inner * hidden;
        let costs = Costs {
            shared_bytes: 2 * (24 * attention + vocab * hidden),
            expert_bytes: expert / 2 + expert / 32,
            experts: 32,
            top_k: 4,
            shared_parameters: 24 * attention,
            expert_parameters: expert,
            head_parameters: vocab * hidden,
            query_width: 4096,
            ..Costs::default()
        };
        ModelInfo { layers: 24, costs, ..demo() }
    }

    #[test]
    fn a_token_uses_its_own_experts_and_many_tokens_use_all() {
        assert!((expected_experts(32, 4, 1) - 4.0).abs() < 1e-9);
        // Two tokens share one expert in eight of four: 4 + 4 - 4 * 4 / 32.
        assert!((expected_experts(32, 4, 2) - 7.5).abs() < 1e-9);
        assert!((expected_experts(32, 4, 256) - 32.0).abs() < 1e-9);
        assert_eq!(expected_experts(32, 4, 0), 0.0);
        assert_eq!(expected_experts(8, 8, 1), 8.0);
        assert_eq!(expected_experts(0, 0, 7), 0.0);
    }

    #[test]
    fn a_step_of_one_reads_what_the_20b_model_reads_for_a_token() {
        let weights = twenty_billion().decode_bytes(1, 0);
        assert!((weights / 1e9 - 3.706).abs() < 0.003, "{weights}");
        let sixteen = twenty_billion().decode_bytes(16, 0);
        assert!((sixteen / 1e9 - 11.39).abs() < 0.03, "{sixteen}");
    }

    #[test]
    fn keys_and_values_count_for_each_sequence_and_within_windows() {
        let info = demo();
        let kv = |batch, context| info.decode_bytes(batch, context) - info.decode_bytes(batch, 0);
        // One head of 64 float32 keys and values in each of two layers.
        let position = 2.0 * 64.0 * 4.0;
        assert_eq!(kv(1, 100), 200.0 * position);
        assert_eq!(kv(3, 1000), 3.0 * (128.0 + 1000.0) * position);
    }

    #[test]
    fn prefill_multiplies_active_parameters_and_visible_pairs() {
        let per_token = |prompt: usize| twenty_billion().prefill_flops(prompt) / prompt as f64;
        // 6.06 GFLOP a token without attention and head.
        assert!((per_token(1024) / 1e9 - 6.06).abs() < 0.03, "{}", per_token(1024));
        let mut info = demo();
        info.costs = Costs { query_width: 128, ..Costs::default() };
        assert_eq!(info.prefill_flops(2), 4.0 * 128.0 * (3.0 + 3.0));
        let full = 1000.0 * 1001.0 / 2.0;
        let windowed = 128.0 * 129.0 / 2.0 + 872.0 * 128.0;
        assert_eq!(info.prefill_flops(1000), 4.0 * 128.0 * (full + windowed));
    }

    #[test]
    fn every_stored_byte_is_shared_or_an_expert_s_or_the_embedding_s() {
        let info = demo();
        let experts = info.costs.expert_bytes * (info.costs.experts * info.layers) as u64;
        let embedding = 1000 * 128 * 2;
        assert_eq!(info.costs.shared_bytes + experts + embedding, info.weight_bytes);
        // Codes, scales and biases of one expert of the demo.
        let (rows, down_rows) = (2 * 64 * 128, 128 * 64);
        assert_eq!(
            info.costs.expert_bytes,
            (rows + down_rows) / 2 + (rows + down_rows) / 32 + 2 * (128 + 128)
        );
        assert_eq!((info.costs.experts, info.costs.top_k, info.costs.query_width), (8, 4, 128));
        assert_eq!(info.costs.expert_parameters, rows + down_rows);
        assert_eq!(info.costs.head_parameters, 1000 * 128);
        // q, k and v, o, and the router.
        assert_eq!(info.costs.shared_parameters, 2 * (128 * 256 + 128 * 128 + 8 * 128));
    }
}
