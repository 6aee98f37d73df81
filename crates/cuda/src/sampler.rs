//! Sampling on the device: uploads what each row of a step wants, issues the two kernels, downloads what they picked.
//!
//! Definitions are those of the CPU backend. What differs: candidates of equal weight but different logits are ordered by logit, where
//! the CPU orders them by id; masses are sums of the same weights in another order, so a draw within 1e-6 of the boundary between
//! two tokens may fall on the other side; and a finite logit that a penalty lifts to infinity is an error.

mod table;

use std::sync::{Arc, Mutex, PoisonError};

use ctxserve_backend::{Batch, DeviceError, SampleError, Sampled};
use ctxserve_core::{TokenLogprob, TokenLogprobs};

use crate::driver::{Buffer, Device, Mark, Pinned};
use crate::ops::sample_pick::{self, ALTERNATIVES, Alternative, Head, SamplePick};
use crate::ops::sample_scan::{self, Header, Line, MAX_PARTS, PART, Partial, SampleScan};
use table::{Lists, line};

const OP: &str = "sample";
/// Words of adjustments there is room for at first.
const WORDS: usize = 1 << 16;

/// Host memory of a step's upload, and when the device has read it.
#[derive(Debug)]
struct Staging {
    table: Pinned<Line>,
    words: Pinned<u32>,
    read: Mark,
}

/// Host memory of a step's outcome, and when it is there.
#[derive(Debug)]
struct Slot {
    heads: Pinned<Head>,
    alternatives: Pinned<Alternative>,
    written: Mark,
}

type Slots = Arc<Mutex<Vec<Slot>>>;

/// The sampler of one stream. Of each step: [`Sampler::upload`], then [`Sampler::issue`] (or a recording of it), then
/// [`Sampler::download`].
#[derive(Debug)]
pub struct Sampler {
    device: Device,
    scan: SampleScan,
    pick: SamplePick,
    rows: usize,
    vocab: usize,
    stride: usize,
    table: Buffer<Line>,
    words: Buffer<u32>,
    partials: Buffer<Partial>,
    heads: Buffer<Head>,
    alternatives: Buffer<Alternative>,
    ids: Buffer<i32>,
    staging: [Staging; 2],
    turn: usize,
    lists: Lists,
    /// The lines that the device has, or will have.
    uploaded: Vec<Line>,
    /// Of each row uploaded last, the alternatives asked for.
    asked: Vec<Option<usize>>,
    slots: Slots,
}

/// A step's outcome on its way to the host.
#[derive(Debug)]
pub struct Pending {
    slot: Option<Slot>,
    asked: Vec<Option<usize>>,
    vocab: usize,
    slots: Slots,
}

impl Sampler {
    /// Takes memory for steps of at most `rows` sampling rows, of `vocab` logits that lie `stride` floats apart.
    ///
    /// # Errors
    /// Out of memory, no code for this device, or a vocabulary that is empty or beyond 523,264.
    pub fn new(device: &Device, rows: usize, vocab: usize, stride: usize) -> Result<Self, DeviceError> {
        let parts = vocab.div_ceil(PART);
        if !(1..=MAX_PARTS).contains(&parts) {
            return Err(DeviceError::new(OP, format!("a vocabulary of {vocab} cannot be sampled from")));
        }
        let staging = || {
            Ok::<_, DeviceError>(Staging {
                table: device.pinned(rows + 1)?,
                words: device.pinned(WORDS)?,
                read: device.mark()?,
            })
        };
        Ok(Self {
            scan: SampleScan::load(device)?,
            pick: SamplePick::load(device)?,
            rows,
            vocab,
            stride,
            table: device.zeros(rows + 1)?,
            words: device.zeros(WORDS)?,
            partials: device.zeros(rows.max(1) * parts)?,
            heads: device.zeros(rows.max(1))?,
            alternatives: device.zeros(rows.max(1) * ALTERNATIVES)?,
            ids: device.zeros(rows.max(1))?,
            staging: [staging()?, staging()?],
            turn: 0,
            lists: Lists::new(vocab),
            uploaded: Vec::with_capacity(rows + 1),
            asked: Vec::new(),
            slots: Arc::default(),
            device: device.clone(),
        })
    }

    /// The ids picked last, `[rows]`: what the next step's feeds name. Always inside the vocabulary.
    pub fn ids(&self) -> &Buffer<i32> {
        &self.ids
    }

    /// Uploads the sampling rows of a step, ordered with the stream: the steps before it are not disturbed. Not to be called while a
    /// graph is recorded.
    ///
    /// # Errors
    /// More rows than there is room for, or a device fault.
    pub fn upload(&mut self, batch: &Batch) -> Result<(), DeviceError> {
        let live = batch.sample_rows().count();
        if live > self.rows {
            return Err(DeviceError::new(OP, format!("{live} rows, there is room for {}", self.rows)));
        }
        let staging = &mut self.staging[self.turn];
        // The device has long read what was staged two steps ago, unless it hangs.
        staging.read.wait()?;
        self.lists.clear();
        self.asked.clear();
        for (at, row) in batch.sample_rows().enumerate() {
            let lists = self.lists.add(row);
            self.asked.push(row.params.logprobs);
            let mask = self.lists.add_mask(row);
            staging.table[at + 1] = line(row, lists, mask);
        }
        let words = self.lists.words();
        if words.len() > self.words.len() {
            // Rare: long histories under penalties. The old memory is freed once the device has done with it.
            self.words = self.device.allocate(words.len().next_power_of_two())?;
        }
        if words.len() > staging.words.len() {
            staging.words = self.device.pinned(words.len().next_power_of_two())?;
        }
        let header = Header { lists: self.words.address(), live: live as u32, ..Header::default() };
        staging.table[0] = bytemuck::cast(header);
        let lines = &staging.table[..=live];
        // Rows that are greedy and plain look the same in every step.
        let same =
            bytemuck::cast_slice::<Line, u8>(lines) == bytemuck::cast_slice::<Line, u8>(&self.uploaded);
        if words.is_empty() && same {
            return Ok(());
        }
        self.uploaded.clear();
        self.uploaded.extend_from_slice(lines);
        self.table.write_pinned(0, &staging.table, live + 1)?;
        if !words.is_empty() {
            staging.words[..words.len()].copy_from_slice(words);
            self.words.write_pinned(0, &staging.words, words.len())?;
        }
        staging.read.again()?;
        self.turn = 1 - self.turn;
        Ok(())
    }

    /// Issues the kernels for up to `rows` rows of `logits`, `[rows, stride]`; those uploaded are sampled. Adjusts the logits in place. May
    /// be recorded: a replay samples what was uploaded before it.
    ///
    /// # Errors
    /// More rows than there is room for, logits that are too few, or a device fault.
    pub fn issue(&self, logits: &Buffer<f32>, rows: usize) -> Result<(), DeviceError> {
        if rows > self.rows {
            return Err(DeviceError::new(OP, format!("{rows} rows, there is room for {}", self.rows)));
        }
        let scan = || sample_scan::Call {
            table: &self.table,
            logits,
            partials: &self.partials,
            rows,
            vocab: self.vocab,
            stride: self.stride,
        };
        self.scan.issue(&self.device, &scan())?;
        let call = sample_pick::Call {
            scan: scan(),
            heads: &self.heads,
            alternatives: &self.alternatives,
            sampled: &self.ids,
        };
        self.pick.issue(&self.device, &call)
    }

    /// Issues the copy of what the rows uploaded last have picked.
    ///
    /// # Errors
    /// Out of host memory, or a device fault.
    pub fn download(&mut self) -> Result<Pending, DeviceError> {
        let rows = self.asked.len();
        let slot = self.slots.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let mut slot = match slot {
            Some(slot) => slot,
            None => Slot {
                heads: self.device.pinned(self.rows)?,
                alternatives: self.device.pinned(self.rows * ALTERNATIVES)?,
                written: self.device.mark()?,
            },
        };
        if rows > 0 {
            self.heads.read_pinned(0, &mut slot.heads, rows)?;
        }
        if self.asked.iter().flatten().any(|&wanted| wanted > 0) {
            self.alternatives.read_pinned(0, &mut slot.alternatives, rows * ALTERNATIVES)?;
        }
        slot.written.again()?;
        let asked = self.asked.clone();
        Ok(Pending { slot: Some(slot), asked, vocab: self.vocab, slots: Arc::clone(&self.slots) })
    }
}

impl Pending {
    /// Waits for it: one outcome per sampling row.
    ///
    /// # Errors
    /// A device fault.
    pub fn wait(self) -> Result<Vec<Result<Sampled, SampleError>>, DeviceError> {
        let Some(slot) = &self.slot else {
            return Err(DeviceError::new(OP, "it was collected before"));
        };
        slot.written.wait()?;
        let rows = slot.heads.iter().zip(slot.alternatives.chunks(ALTERNATIVES)).zip(&self.asked);
        Ok(rows.map(|((head, all), asked)| outcome(head, all, *asked, self.vocab)).collect())
    }
}

impl Drop for Pending {
    fn drop(&mut self) {
        // A copy that is still on its way is ordered before the next one into the same memory.
        if let Some(slot) = self.slot.take() {
            self.slots.lock().unwrap_or_else(PoisonError::into_inner).push(slot);
        }
    }
}

fn outcome(
    &[id, status, logprob, _]: &Head,
    alternatives: &[Alternative],
    asked: Option<usize>,
    vocab: usize,
) -> Result<Sampled, SampleError> {
    match status {
        0 => {}
        sample_pick::NOTHING_LEFT => return Err(SampleError::NothingLeft),
        _ => return Err(SampleError::NonFinite),
    }
    let logprobs = asked.map(|wanted| {
        let read = |&[id, bits]: &Alternative| TokenLogprob { id, logprob: f32::from_bits(bits) };
        let top = alternatives.iter().take(wanted.min(vocab)).map(read).collect();
        Box::new(TokenLogprobs { sampled: read(&[id, logprob]), top })
    });
    Ok(Sampled { id, logprobs })
}
