//! One step's description on the device: what every kernel reads instead of launch arguments, so that launches can be
//! recorded once and replayed.

use ctxserve_backend::{Batch, DeviceError, KvPlan, SequenceSlice};

use crate::driver::{Buffer, Device, Mark, Pinned};
use crate::ops::attention_prefill::AttentionPrefill;
use crate::ops::kv_gather::{LINES, lines_of};
use crate::ops::unpack::{PARTS, Unpack};

const OP: &str = "begin";
/// Steps that may be prepared before the oldest has been read by the device.
const SETS: usize = 2;

/// How a batch falls into parts that different kernels take.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Shape {
    /// Tokens.
    pub(crate) rows: usize,
    /// Leading sequences of one row each: decode.
    pub(crate) decode: usize,
    /// The sequences after them: prefill, of any number of rows.
    pub(crate) prefill: usize,
    /// Rows whose logits are wanted.
    pub(crate) logits: usize,
}

impl Shape {
    /// Of a batch.
    pub(crate) fn of(batch: &Batch) -> Self {
        let decode = batch.sequences.iter().take_while(|slice| slice.rows.len() == 1).count();
        Self {
            rows: batch.tokens.len(),
            decode,
            prefill: batch.sequences.len() - decode,
            logits: batch.logit_rows().count(),
        }
    }

    /// Whether every sequence has one row.
    pub(crate) fn is_decode(&self) -> bool {
        self.prefill == 0
    }
}

/// Rows that grids are made for: those of the step, or those of its bucket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Tokens.
    pub(crate) rows: usize,
    /// Leading sequences of one row.
    pub(crate) decode: usize,
    /// Other sequences.
    pub(crate) prefill: usize,
    /// Rows of logits.
    pub(crate) logits: usize,
    /// Whether the rows are those of the logits, in order.
    pub(crate) narrowed: bool,
}

impl Extent {
    /// Rows that panels are laid out for.
    pub(crate) fn capacity(&self) -> usize {
        self.rows.next_multiple_of(8)
    }
}

impl From<Shape> for Extent {
    fn from(shape: Shape) -> Self {
        let Shape { rows, decode, prefill, logits } = shape;
        Self { rows, decode, prefill, logits, narrowed: false }
    }
}

/// What the arrays have room for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Capacity {
    /// Tokens of a step.
    pub rows: usize,
    /// Sequences of a step.
    pub sequences: usize,
    /// Longest sequence, tokens.
    pub context: usize,
    /// Lines of the scratch for gathered keys, a head; a multiple of 128.
    pub scratch_lines: usize,
}

impl Capacity {
    /// For steps of `rows` tokens of up to `sequences` sequences, none longer than `max_context`. The scratch holds the
    /// longest context, or a step of short ones that are padded each.
    pub fn new(rows: usize, sequences: usize, max_context: usize) -> Self {
        let scratch_lines = (max_context + LINES).max(2 * rows).next_multiple_of(LINES);
        Self { rows, sequences, context: max_context, scratch_lines }
    }
}

/// Arrays of one KV group. All `i32`.
#[derive(Debug)]
pub(crate) struct GroupArrays {
    /// `[rows]`: page * page size + offset of the row's key and value.
    pub(crate) slot: Buffer<i32>,
    /// `[sequences]`: where the sequence's pages begin in `pages`.
    pub(crate) table_at: Buffer<i32>,
    /// `[sequences]`: logical index of its first page.
    pub(crate) table_first: Buffer<i32>,
    /// Physical pages of all sequences, one after the other.
    pub(crate) pages: Buffer<i32>,
}

/// Prefill sequences whose gathered keys and values fit the scratch together, of one group.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Pass {
    /// The first of them among the step's sequences.
    pub(crate) first: usize,
    /// How many.
    pub(crate) count: usize,
    /// Scratch lines of a head.
    pub(crate) lines: usize,
    /// Runs of rows that blocks take.
    pub(crate) runs: usize,
}

/// The arrays. Views into one block, which `block` keeps alive.
#[derive(Debug)]
pub(crate) struct Arrays {
    /// One integer each: rows, decode sequences, logit rows.
    pub(crate) rows: Buffer<i32>,
    /// See `rows`.
    pub(crate) decode: Buffer<i32>,
    /// See `rows`.
    pub(crate) logits: Buffer<i32>,
    /// `[rows]`: input ids.
    pub(crate) tokens: Buffer<i32>,
    /// `[rows]`: the sampling row of the step before whose pick is the input, or -1.
    pub(crate) feed: Buffer<i32>,
    /// `[rows]`: position in its sequence.
    pub(crate) position: Buffer<i32>,
    /// `[sequences]`: first row.
    pub(crate) first_row: Buffer<i32>,
    /// `[sequences]`: rows.
    pub(crate) row_count: Buffer<i32>,
    /// `[sequences]`: position of the first row.
    pub(crate) start: Buffer<i32>,
    /// `[logit rows]`: the row of the residual stream.
    pub(crate) logit_row: Buffer<i32>,
    /// `[logit rows]`: the sequence.
    pub(crate) logit_sequence: Buffer<i32>,
    /// One entry a KV group.
    pub(crate) groups: Vec<GroupArrays>,
    block: Buffer<u32>,
}

/// Offsets of the arrays in words.
#[derive(Clone, Debug)]
struct Layout {
    tokens: usize,
    feed: usize,
    position: usize,
    first_row: usize,
    row_count: usize,
    start: usize,
    logit_row: usize,
    logit_sequence: usize,
    groups: Vec<[usize; 4]>,
    pages: Vec<usize>,
    end: usize,
}

impl Layout {
    fn new(capacity: Capacity, plan: &KvPlan) -> Self {
        let mut end = 64;
        let mut take = |words: usize| {
            let at = end;
            // 256-byte steps, so that no array shares a line with another.
            end += words.max(1).next_multiple_of(64);
            at
        };
        let Capacity { rows, sequences, context, .. } = capacity;
        // Sequences may share pages, so there is room for what each of them has at most: all have one row more than they
        // hold, and all of a step's rows together span so many pages.
        let tables = |group| plan.spec.pages_for(group, context + rows, 1) * sequences;
        let spans = rows.div_ceil(plan.spec.page_size) + sequences;
        let pages: Vec<usize> = (0..plan.pages.len()).map(|group| tables(group) + spans).collect();
        let mut group = |&count: &usize| [take(rows), take(sequences), take(sequences), take(count)];
        let groups = pages.iter().map(&mut group).collect();
        let [tokens, feed, position] = [take(rows), take(rows), take(rows)];
        let [first_row, row_count, start, logit_row, logit_sequence] = [(); 5].map(|()| take(sequences));
        Self {
            tokens,
            feed,
            position,
            first_row,
            row_count,
            start,
            logit_row,
            logit_sequence,
            groups,
            pages,
            end,
        }
    }
}

/// Describes steps to the device.
#[derive(Debug)]
pub(crate) struct Description {
    arrays: Arrays,
    layout: Layout,
    capacity: Capacity,
    plan: KvPlan,
    unpack: Unpack,
    staging: [(Pinned<u32>, Option<Mark>); SETS],
    turn: usize,
    scratch: [Vec<u32>; 2],
    passes: Vec<Vec<Pass>>,
}

impl Description {
    /// Takes memory for steps of that capacity.
    ///
    /// # Errors
    /// Out of memory.
    pub(crate) fn new(device: &Device, capacity: Capacity, plan: &KvPlan) -> Result<Self, DeviceError> {
        let layout = Layout::new(capacity, plan);
        let block: Buffer<u32> = device.zeros(layout.end)?;
        let view = |at: usize, len: usize| {
            // SAFETY: `block` is moved into the same struct as its views and never replaced.
            unsafe { block.view::<i32>(at * 4, len) }
        };
        let Capacity { rows, sequences, .. } = capacity;
        let groups = layout.groups.iter().zip(&layout.pages).map(|(&[slot, at, first, pages], &count)| {
            Ok(GroupArrays {
                slot: view(slot, rows)?,
                table_at: view(at, sequences)?,
                table_first: view(first, sequences)?,
                pages: view(pages, count)?,
            })
        });
        let groups = groups.collect::<Result<_, DeviceError>>()?;
        let arrays = Arrays {
            rows: view(0, 1)?,
            decode: view(1, 1)?,
            logits: view(2, 1)?,
            tokens: view(layout.tokens, rows)?,
            feed: view(layout.feed, rows)?,
            position: view(layout.position, rows)?,
            first_row: view(layout.first_row, sequences)?,
            row_count: view(layout.row_count, sequences)?,
            start: view(layout.start, sequences)?,
            logit_row: view(layout.logit_row, sequences)?,
            logit_sequence: view(layout.logit_sequence, sequences)?,
            groups,
            block,
        };
        let staging = [(device.pinned(layout.end)?, None), (device.pinned(layout.end)?, None)];
        let unpack = Unpack::load(device)?;
        let plan = plan.clone();
        Ok(Self {
            arrays,
            layout,
            capacity,
            plan,
            unpack,
            staging,
            turn: 0,
            scratch: Default::default(),
            passes: Vec::new(),
        })
    }

    /// The arrays, as of the step begun last.
    pub(crate) fn arrays(&self) -> &Arrays {
        &self.arrays
    }

    /// The arrays of the group that a model's layer is in.
    pub(crate) fn group_of(&self, layer: usize) -> Option<&GroupArrays> {
        self.plan.spec.place(layer).and_then(|(group, _)| self.arrays.groups.get(group))
    }

    /// The passes of a group's prefill sequences, as of the step begun last.
    pub(crate) fn passes(&self, group: usize) -> &[Pass] {
        self.passes.get(group).map_or(&[], Vec::as_slice)
    }

    /// Issues the description of a step. `prefill` cuts rows into the runs that its blocks take.
    ///
    /// # Errors
    /// A batch beyond the capacity or without pages, or a device fault.
    pub(crate) fn begin(
        &mut self,
        device: &Device,
        batch: &Batch,
        prefill: &AttentionPrefill,
    ) -> Result<Shape, DeviceError> {
        let shape = Shape::of(batch);
        let Capacity { rows, sequences, scratch_lines, .. } = self.capacity;
        if shape.rows > rows || batch.sequences.len() > sequences {
            return Err(DeviceError::new(
                OP,
                format!(
                    "{} rows, {} sequences; there is room for {rows}, {sequences}",
                    shape.rows,
                    batch.sequences.len()
                ),
            ));
        }
        self.turn = (self.turn + 1) % SETS;
        let Self { layout, plan, scratch, passes, .. } = self;
        let (staging, mark) = &mut self.staging[self.turn];
        if let Some(mark) = mark {
            mark.wait()?;
        }
        let mut parts = Vec::with_capacity(PARTS);
        let mut words = 0;
        let mut put = |at: usize, values: &mut dyn Iterator<Item = u32>| {
            let first = words;
            for value in values {
                let Some(place) = staging.get_mut(words) else { return false };
                *place = value;
                words += 1;
            }
            if words > first {
                parts.push((at, words - first));
            }
            true
        };
        let slices = &batch.sequences;
        let mut fits = put(0, &mut [shape.rows, shape.decode, shape.logits].into_iter().map(|n| n as u32));
        fits &= put(layout.tokens, &mut batch.tokens.iter().copied());
        let feeds = |slice: &SequenceSlice| {
            let feed = slice.feed.map_or(u32::MAX, |row| row as u32);
            std::iter::repeat_n(feed, slice.rows.len())
        };
        fits &= put(layout.feed, &mut slices.iter().flat_map(feeds));
        let positions = |s: &SequenceSlice| (s.start..s.start + s.rows.len()).map(|p| p as u32);
        fits &= put(layout.position, &mut slices.iter().flat_map(positions));
        fits &= put(layout.first_row, &mut slices.iter().map(|slice| slice.rows.start as u32));
        fits &= put(layout.row_count, &mut slices.iter().map(|slice| slice.rows.len() as u32));
        fits &= put(layout.start, &mut slices.iter().map(|slice| slice.start as u32));
        fits &= put(layout.logit_row, &mut batch.logit_rows().map(|row| row as u32));
        let sampled = slices.iter().enumerate().filter(|(_, slice)| slice.sample.is_some());
        fits &= put(layout.logit_sequence, &mut sampled.map(|(at, _)| at as u32));
        let page_size = plan.spec.page_size;
        passes.resize_with(layout.groups.len(), Vec::new);
        let [slots, starts] = scratch;
        for (group, (&places, passes)) in layout.groups.iter().zip(passes).enumerate() {
            let [slot, at, first, pages] = places;
            slots.clear();
            starts.clear();
            passes.clear();
            let mut total = 0;
            for slice in slices {
                let Some(table) = slice.tables.get(group) else {
                    return Err(DeviceError::new(OP, "a page table is missing"));
                };
                starts.push(total);
                total += table.pages.len() as u32;
                for position in slice.start..slice.start + slice.rows.len() {
                    let Some((page, offset)) = table.locate(position, page_size) else {
                        return Err(DeviceError::new(OP, format!("position {position} has no page")));
                    };
                    slots.push(page * page_size as u32 + offset as u32);
                }
            }
            if total as usize > layout.pages[group] {
                return Err(DeviceError::new(
                    OP,
                    format!("{total} pages, there is room for {}", layout.pages[group]),
                ));
            }
            fits &= put(slot, &mut slots.iter().copied());
            fits &= put(at, &mut starts.iter().copied());
            let tables = || slices.iter().filter_map(|slice| slice.tables.get(group));
            fits &= put(first, &mut tables().map(|table| table.first as u32));
            fits &= put(pages, &mut tables().flat_map(|table| table.pages.iter().copied()));
            let window = plan.spec.groups[group].window;
            let mut next = shape.decode;
            while next < slices.len() {
                let mut pass = Pass { first: next, count: 0, lines: 0, runs: 0 };
                while let Some(slice) = slices.get(next) {
                    let lines = pass.lines + lines_of(slice.start, slice.rows.len(), window);
                    if lines > scratch_lines {
                        break;
                    }
                    let runs = pass.runs + prefill.runs_of(slice.rows.len());
                    pass = Pass { count: pass.count + 1, lines, runs, ..pass };
                    next += 1;
                }
                if pass.count == 0 {
                    return Err(DeviceError::new(OP, format!("a context beyond {scratch_lines} positions")));
                }
                passes.push(pass);
            }
        }
        if !fits {
            return Err(DeviceError::new(OP, "the description outgrew its staging memory"));
        }
        self.unpack.issue(device, staging, &self.arrays.block, &parts)?;
        match mark {
            Some(mark) => mark.again()?,
            None => *mark = Some(device.mark()?),
        }
        Ok(shape)
    }
}
