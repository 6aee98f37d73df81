//! The fast half: tokens grouped by expert, so that a step streams each expert's weights once.

use rayon::prelude::*;

use super::{Choice, CpuExperts};
use crate::backend::Fast;
use crate::kernels;
use crate::linear::{Inputs, Picked};
use crate::packed::{PANEL, Packed};
use crate::rows::Rows;

/// Gate/up pairs of a panel.
const PAIRS: usize = PANEL / 2;

/// The tokens of one expert: `count` assignments from `first` on, assignments being numbered expert by expert.
struct Group {
    expert: usize,
    first: usize,
    count: usize,
}

/// Some panels of one group, with the place of their results.
struct Task<'a> {
    group: usize,
    panel: usize,
    out: &'a mut [f32],
}

/// `x += sum over choices of weight * (down(swiglu(gate_up(normed))) + bias)`.
pub(super) fn add(
    fast: &Fast,
    (gate_up, down): (&Packed, &Packed),
    experts: &CpuExperts,
    normed: &Rows,
    choices: &[Vec<Choice>],
    x: &mut Rows,
) {
    let (groups, assignments) = assign(choices, experts.spec.experts);
    let token_of = token_of(&assignments, choices);
    fast.pool.install(|| {
        let inputs = Inputs::new(normed.data(), normed.cols(), gate_up.takes_int8(fast.int8));
        let picked: Vec<Picked<'_>> = groups
            .iter()
            .map(|group| inputs.pick(token_of[group.first..][..group.count].iter().copied()))
            .collect();
        let activations = activate(fast, gate_up, experts, &groups, &picked);

        let inputs = Inputs::new(activations.data(), activations.cols(), down.takes_int8(fast.int8));
        let picked: Vec<Picked<'_>> =
            groups.iter().map(|group| inputs.pick(group.first..group.first + group.count)).collect();
        let mut outputs = vec![0.0; token_of.len() * down.panels() * PANEL];
        let tasks = tasks(fast, &groups, down.panels(), PANEL, &mut outputs);
        tasks.into_par_iter().for_each_init(Vec::new, |scratch, task| {
            let panel = groups[task.group].expert * down.panels() + task.panel;
            kernels::panels(fast.isa, down, panel, picked[task.group].tokens(), scratch, task.out);
        });
        let rows = x.data_mut().par_chunks_mut(experts.spec.hidden).zip(choices).zip(&assignments);
        rows.for_each(|((x, choices), places)| {
            combine(&groups, down.panels(), &outputs, experts, choices, places, x);
        });
    });
}

/// Groups of the experts in use, and each token's assignment (group, number within it) per choice.
fn assign(choices: &[Vec<Choice>], experts: usize) -> (Vec<Group>, Vec<Vec<(usize, usize)>>) {
    let mut counts = vec![0; experts];
    choices.iter().flatten().for_each(|choice| counts[choice.expert] += 1);
    let (mut groups, mut group_of, mut first) = (Vec::new(), vec![0; experts], 0);
    for (expert, &count) in counts.iter().enumerate() {
        if count > 0 {
            group_of[expert] = groups.len();
            groups.push(Group { expert, first, count });
            first += count;
        }
    }
    let mut filled = vec![0; groups.len()];
    let assignments = choices
        .iter()
        .map(|choices| {
            let place = |choice: &Choice| {
                let group = group_of[choice.expert];
                filled[group] += 1;
                (group, filled[group] - 1)
            };
            choices.iter().map(place).collect()
        })
        .collect();
    (groups, assignments)
}

/// The token of each assignment, in assignment order.
fn token_of(assignments: &[Vec<(usize, usize)>], choices: &[Vec<Choice>]) -> Vec<usize> {
    let mut tokens: Vec<(usize, usize, usize)> = Vec::with_capacity(choices.iter().map(Vec::len).sum());
    for (token, places) in assignments.iter().enumerate() {
        tokens.extend(places.iter().map(|&(group, within)| (group, within, token)));
    }
    tokens.sort_unstable();
    tokens.into_iter().map(|(_, _, token)| token).collect()
}

/// Cuts a buffer `[groups][panels][group count][width]` into tasks.
fn tasks<'a>(
    fast: &Fast,
    groups: &[Group],
    panels: usize,
    width: usize,
    mut buffer: &'a mut [f32],
) -> Vec<Task<'a>> {
    let chunk = fast.chunk(panels * groups.len());
    let mut tasks = Vec::new();
    for (group, Group { count, .. }) in groups.iter().enumerate() {
        let (mine, rest) = buffer.split_at_mut(panels * count * width);
        let parts = mine.chunks_mut(chunk * count * width).enumerate();
        tasks.extend(parts.map(|(at, out)| Task { group, panel: at * chunk, out }));
        buffer = rest;
    }
    tasks
}

/// Gate/up and SwiGLU: `[assignments, inner]`.
fn activate(
    fast: &Fast,
    gate_up: &Packed,
    experts: &CpuExperts,
    groups: &[Group],
    picked: &[Picked<'_>],
) -> Rows {
    let inner = experts.spec.inner;
    let total: usize = groups.iter().map(|group| group.count).sum();
    let mut buffer = vec![0.0; total * gate_up.panels() * PAIRS];
    let tasks = tasks(fast, groups, gate_up.panels(), PAIRS, &mut buffer);
    tasks.into_par_iter().for_each_init(
        || (Vec::new(), Vec::new()),
        |(scratch, gated), task| {
            let Group { expert, count, .. } = groups[task.group];
            gated.clear();
            gated.resize(task.out.len() * 2, 0.0);
            let panel = expert * gate_up.panels() + task.panel;
            kernels::panels(fast.isa, gate_up, panel, picked[task.group].tokens(), scratch, gated);
            let bias = &experts.gate_up_bias[expert * 2 * inner..][..2 * inner];
            let parts = task.out.chunks_mut(count * PAIRS).zip(gated.chunks_exact(count * PANEL));
            for (at, (out, gated)) in parts.enumerate() {
                let start = (task.panel + at) * PANEL;
                let bias = &bias[start..(start + PANEL).min(bias.len())];
                for (out, gated) in out.chunks_exact_mut(PAIRS).zip(gated.chunks_exact(PANEL)) {
                    let (alpha, limit) = (experts.spec.alpha, experts.spec.limit);
                    kernels::swiglu(fast.isa, gated, bias, alpha, limit, out);
                }
            }
        },
    );
    // [groups][panels][count][8] to rows; what pads the last panel is dropped.
    let mut rows = Rows::zeros(total, inner);
    let group_of = groups.iter().flat_map(|group| std::iter::repeat_n(group, group.count));
    let owners: Vec<&Group> = group_of.collect();
    rows.data_mut().par_chunks_mut(inner).enumerate().for_each(|(row, out)| {
        let Group { first, count, .. } = *owners[row];
        let from = &buffer[first * gate_up.panels() * PAIRS..];
        for (panel, out) in out.chunks_mut(PAIRS).enumerate() {
            let at = (panel * count + row - first) * PAIRS;
            out.copy_from_slice(&from[at..][..out.len()]);
        }
    });
    rows
}

/// Adds one token's experts in the order of its choices, which its neighbours cannot change.
fn combine(
    groups: &[Group],
    panels: usize,
    outputs: &[f32],
    experts: &CpuExperts,
    choices: &[Choice],
    places: &[(usize, usize)],
    x: &mut [f32],
) {
    let hidden = x.len();
    for (panel, x) in x.chunks_mut(PANEL).enumerate() {
        let mut sums = [0.0_f32; PANEL];
        for (choice, &(group, within)) in choices.iter().zip(places) {
            let Group { first, count, .. } = groups[group];
            let at = (first * panels + panel * count + within) * PANEL;
            let bias = &experts.down_bias[choice.expert * hidden + panel * PANEL..][..x.len()];
            for ((sum, y), b) in sums.iter_mut().zip(&outputs[at..][..x.len()]).zip(bias) {
                *sum += choice.weight * (y + b);
            }
        }
        x.iter_mut().zip(sums).for_each(|(x, sum)| *x += sum);
    }
}
