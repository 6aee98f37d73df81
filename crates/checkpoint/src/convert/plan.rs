//! What is written: which tensors become what, in which file.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use ctxserve_core::{MXFP4_BLOCK, NVFP4_BLOCK};

use super::Target;
use crate::check::{Shape, Want};
use crate::dtype::Dtype;
use crate::writer::TensorSpec;

/// Everything that is written.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) shards: Vec<Shard>,
    /// Matrices that share a factor, by the number that [`Rule::Nvfp4`] has.
    pub(super) groups: Vec<Vec<Want>>,
    /// Linear modules that NVFP4 leaves in floats.
    pub(super) excluded: BTreeSet<String>,
}

/// One file.
#[derive(Debug)]
pub(super) struct Shard {
    pub(super) file: String,
    pub(super) items: Vec<Item>,
}

/// One logical tensor and what becomes of it.
#[derive(Debug)]
pub(super) struct Item {
    pub(super) want: Want,
    pub(super) rule: Rule,
    pub(super) specs: Vec<TensorSpec>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Rule {
    /// BF16 under its own name.
    Floats,
    /// An expert stack in BF16, turned to `[E, in, out]`.
    Turned,
    /// An expert stack as `_blocks` and `_scales`.
    Mxfp4,
    /// A matrix as `weight`, `weight_scale`, `weight_scale_2`, `input_scale`; the number of its group.
    Nvfp4(usize),
}

impl Plan {
    /// The largest input of each group, of its modules' in `inputs`; `None` where nothing is known. The error names one that is
    /// no magnitude.
    pub(super) fn inputs(&self, inputs: &BTreeMap<String, f32>) -> Result<Vec<Option<f32>>, String> {
        if let Some((module, input)) = inputs.iter().find(|(_, input)| !(input.is_finite() && **input >= 0.0))
        {
            return Err(format!("{module}: an input of {input} cannot be stored"));
        }
        let module = |want: &Want| projection(&want.name).and_then(|module| inputs.get(module)).copied();
        Ok(self.groups.iter().map(|group| group.iter().filter_map(module).reduce(f32::max)).collect())
    }
}

/// Decides for every tensor. The error says why the model cannot be stored so.
pub(super) fn plan(wants: &[Want], target: Target, shard_bytes: u64) -> Result<Plan, String> {
    let stacks: HashMap<&str, usize> = wants
        .iter()
        .filter_map(|want| match want.shape {
            Shape::Experts { experts, .. } => Some((want.name.as_str(), experts)),
            _ => None,
        })
        .collect();
    if target == Target::Mxfp4 && stacks.is_empty() {
        return Err(
            "mxfp4 holds expert stacks, and this model has none: nvfp4 and bf16 can hold it".to_owned()
        );
    }
    let (mut groups, mut numbers, mut excluded) = (Vec::<Vec<Want>>::new(), HashMap::new(), BTreeSet::new());
    let mut items = Vec::with_capacity(wants.len());
    for want in wants {
        let rule = match (want.shape, target) {
            (Shape::Experts { .. }, Target::Bf16) => Rule::Turned,
            (Shape::Experts { cols, .. }, Target::Mxfp4) => {
                if !cols.is_multiple_of(MXFP4_BLOCK) {
                    return Err(format!("{}: {cols} inputs are not a multiple of {MXFP4_BLOCK}", want.name));
                }
                Rule::Mxfp4
            }
            (Shape::Experts { .. }, Target::Nvfp4) => {
                return Err("nvfp4 is written for matrices, and this model has expert stacks: mxfp4 and bf16 can hold \
                            them"
                    .to_owned());
            }
            (Shape::Matrix { cols, .. }, Target::Nvfp4) => match projection(&want.name) {
                Some(module) if cols.is_multiple_of(NVFP4_BLOCK) => {
                    let number = *numbers.entry(fused(module)).or_insert(groups.len());
                    if number == groups.len() {
                        groups.push(Vec::new());
                    }
                    if let Some(group) = groups.get_mut(number) {
                        group.push(want.clone());
                    }
                    Rule::Nvfp4(number)
                }
                _ => {
                    excluded.extend(linear(&want.name));
                    Rule::Floats
                }
            },
            _ => Rule::Floats,
        };
        items.push(Item { specs: specs(want, rule, &stacks), want: want.clone(), rule });
    }
    if target == Target::Nvfp4 && groups.is_empty() {
        return Err("there is no projection that nvfp4 could hold".to_owned());
    }
    Ok(Plan { shards: shards(items, shard_bytes), groups, excluded })
}

/// The module of a projection inside a layer: what is quantised.
fn projection(name: &str) -> Option<&str> {
    let module = name.strip_suffix(".weight")?;
    (module.contains(".layers.") && module.ends_with("_proj")).then_some(module)
}

/// The module of a linear layer; embeddings are none.
fn linear(name: &str) -> Option<String> {
    name.strip_suffix(".weight").filter(|module| !module.contains("embed")).map(str::to_owned)
}

/// What servers compute in one product, and read with one factor: the projections of the same input.
fn fused(module: &str) -> String {
    let (layer, leaf) = module.rsplit_once('.').unwrap_or(("", module));
    match leaf {
        "q_proj" | "k_proj" | "v_proj" => format!("{layer}.qkv"),
        "gate_proj" | "up_proj" => format!("{layer}.gate_up"),
        leaf => format!("{layer}.{leaf}"),
    }
}

/// The stored tensors of an item, in the order in which [`Rule`] names them.
fn specs(want: &Want, rule: Rule, stacks: &HashMap<&str, usize>) -> Vec<TensorSpec> {
    let spec = |name: &str, dtype, shape| TensorSpec { name: name.to_owned(), dtype, shape };
    let own = |shape| vec![spec(&want.name, Dtype::BF16, shape)];
    match (want.shape, rule) {
        (Shape::Experts { experts, rows, cols }, Rule::Mxfp4) => {
            let blocks = cols / MXFP4_BLOCK;
            vec![
                spec(
                    &format!("{}_blocks", want.name),
                    Dtype::U8,
                    vec![experts, rows, blocks, MXFP4_BLOCK / 2],
                ),
                spec(&format!("{}_scales", want.name), Dtype::U8, vec![experts, rows, blocks]),
            ]
        }
        (Shape::Experts { experts, rows, cols }, _) => own(vec![experts, cols, rows]),
        (Shape::Matrix { rows, cols }, Rule::Nvfp4(_)) => vec![
            spec(&want.name, Dtype::U8, vec![rows, cols / 2]),
            spec(&format!("{}_scale", want.name), Dtype::F8_E4M3, vec![rows, cols / NVFP4_BLOCK]),
            spec(&format!("{}_scale_2", want.name), Dtype::F32, vec![]),
            spec(&format!("{}.input_scale", projection(&want.name).unwrap_or_default()), Dtype::F32, vec![]),
        ],
        (Shape::Matrix { rows, cols }, _) => own(vec![rows, cols]),
        (Shape::Vector { len }, _) => {
            let experts = want.name.strip_suffix("_bias").and_then(|stack| stacks.get(stack));
            match experts {
                Some(&experts) if experts > 0 => own(vec![experts, len / experts]),
                _ => own(vec![len]),
            }
        }
    }
}

/// Bytes that an item takes.
fn bytes(item: &Item) -> u64 {
    let size = |spec: &TensorSpec| {
        let dims: Vec<u64> = spec.shape.iter().map(|&dim| dim as u64).collect();
        spec.dtype.bytes(&dims).unwrap_or(u64::MAX)
    };
    item.specs.iter().map(size).fold(0, u64::saturating_add)
}

/// Fills files in order up to a size; an item is never split.
fn shards(items: Vec<Item>, limit: u64) -> Vec<Shard> {
    let mut files: Vec<(u64, Vec<Item>)> = Vec::new();
    for item in items {
        let size = bytes(&item);
        match files.last_mut() {
            Some((filled, items)) if filled.saturating_add(size) <= limit => {
                *filled += size;
                items.push(item);
            }
            _ => files.push((size, vec![item])),
        }
    }
    let count = files.len();
    let name = |at: usize| match count {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{:05}-of-{count:05}.safetensors", at + 1),
    };
    files.into_iter().enumerate().map(|(at, (_, items))| Shard { file: name(at), items }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn want(name: &str, shape: Shape) -> Want {
        Want { name: name.to_owned(), shape }
    }

    fn matrix(name: &str, cols: usize) -> Want {
        want(&format!("{name}.weight"), Shape::Matrix { rows: 4, cols })
    }

    #[test]
    fn projections_of_one_input_share_a_group() {
        let layer = |leaf: &str| format!("model.layers.3.{leaf}");
        let mut wants = vec![matrix("model.embed_tokens", 32)];
        let names = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"];
        let names = names.into_iter().chain(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.router"]);
        wants.extend(names.map(|name| matrix(&layer(name), 32)));
        wants.extend([matrix(&layer("mlp.odd_proj"), 40), matrix("lm_head", 32)]);
        let plan = plan(&wants, Target::Nvfp4, 1 << 30).unwrap();
        let sizes: Vec<usize> = plan.groups.iter().map(Vec::len).collect();
        assert_eq!(sizes, [3, 1, 2, 1]);
        let excluded: Vec<&str> = plan.excluded.iter().map(String::as_str).collect();
        assert_eq!(excluded, ["lm_head", "model.layers.3.mlp.odd_proj", "model.layers.3.mlp.router"]);
        let names: Vec<&str> = plan.shards[0].items[1].specs.iter().map(|spec| spec.name.as_str()).collect();
        let input = |name: &str, value| (layer(name), value);
        let inputs =
            [("self_attn.q_proj", 1.0), ("self_attn.v_proj", 3.0), ("mlp.down_proj", 0.0), ("x", 9.0)];
        let inputs = BTreeMap::from(inputs.map(|(name, value)| input(name, value)));
        assert_eq!(plan.inputs(&inputs).unwrap(), [Some(3.0), None, None, Some(0.0)]);
        for bad in [f32::NAN, f32::INFINITY, -1.0] {
            let error = plan.inputs(&BTreeMap::from([input("mlp.up_proj", bad)])).unwrap_err();
            assert!(error.contains("layers.3.mlp.up_proj"), "{error}");
        }
        let q = "model.layers.3.self_attn.q_proj";
        let wanted =
            ["weight", "weight_scale", "weight_scale_2", "input_scale"].map(|leaf| format!("{q}.{leaf}"));
        assert_eq!(names, wanted);
    }

    #[test]
    fn biases_of_stacks_have_a_row_an_expert() {
        let stack = Shape::Experts { experts: 2, rows: 6, cols: 32 };
        let wants = [want("a.experts.up", stack), want("a.experts.up_bias", Shape::Vector { len: 12 })];
        for (target, wanted) in [
            (Target::Mxfp4, vec![vec![2, 6, 1, 16], vec![2, 6, 1], vec![2, 6]]),
            (Target::Bf16, vec![vec![2, 32, 6], vec![2, 6]]),
        ] {
            let plan = plan(&wants, target, 1 << 30).unwrap();
            let items = plan.shards.iter().flat_map(|shard| &shard.items);
            let shapes: Vec<_> = items.flat_map(|item| &item.specs).map(|spec| spec.shape.clone()).collect();
            assert_eq!(shapes, wanted);
        }
    }

    #[test]
    fn what_a_format_cannot_hold_is_said() {
        let stack = |cols| want("e", Shape::Experts { experts: 2, rows: 6, cols });
        for (wants, target, wanted) in [
            (vec![matrix("model.layers.0.q_proj", 32)], Target::Mxfp4, "this model has none"),
            (vec![stack(33)], Target::Mxfp4, "33 inputs"),
            (vec![stack(32)], Target::Nvfp4, "this model has expert stacks"),
            (vec![matrix("lm_head", 32)], Target::Nvfp4, "no projection"),
        ] {
            let error = plan(&wants, target, 1).unwrap_err();
            assert!(error.contains(wanted), "{error}");
        }
    }

    #[test]
    fn files_are_filled_in_order() {
        let wants: Vec<Want> = (0..5).map(|i| matrix(&i.to_string(), 10)).collect();
        let files = |limit| {
            let plan = plan(&wants, Target::Bf16, limit).unwrap();
            plan.shards.into_iter().map(|shard| (shard.file, shard.items.len())).collect::<Vec<_>>()
        };
        assert_eq!(files(400), [("model.safetensors".to_owned(), 5)]);
        let wanted = [2, 2, 1].into_iter().enumerate();
        let wanted = wanted.map(|(i, n)| (format!("model-{:05}-of-00003.safetensors", i + 1), n));
        assert_eq!(files(160), wanted.collect::<Vec<_>>());
        assert_eq!(files(0).len(), 5);
    }
}
