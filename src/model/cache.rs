//! Keys and values of tokens already read.

use tch::{Device, Kind, Tensor};

use super::config::DecoderConfig;
use crate::{Result, tensor::index};

/// Keys and values of every block for rows that grow, each from its own length. Rows do not share storage, and a row's
/// tokens stand in the order of their positions from slot 0.
#[derive(Debug)]
pub(super) struct KvCache {
    /// Keys and values of each block, `[rows * capacity, kv_heads, head_dim]`.
    blocks: Vec<(Tensor, Tensor)>,
    /// Tokens that each row holds.
    lengths: Vec<usize>,
    capacity: usize,
}

impl KvCache {
    pub(super) fn new(config: &DecoderConfig, rows: usize, kind: Kind, device: Device) -> Result<Self> {
        let size = [0, config.kv_heads as i64, config.head_dim as i64];
        let empty = || Tensor::f_zeros(size, (kind, device));
        let blocks = (0..config.layers).map(|_| Ok((empty()?, empty()?))).collect::<Result<_>>()?;
        Ok(Self { blocks, lengths: vec![0; rows], capacity: 0 })
    }

    /// One row, of whose tokens these are the keys and values of each block, `[kv_heads, tokens, head_dim]`.
    pub(super) fn of_text(blocks: &[(Tensor, Tensor)], tokens: usize) -> Result<Self> {
        let flat = |all: &Tensor| all.f_transpose(0, 1)?.f_contiguous();
        let blocks = blocks.iter().map(|(keys, values)| Ok((flat(keys)?, flat(values)?))).collect::<Result<_>>()?;
        Ok(Self { blocks, lengths: vec![tokens], capacity: tokens })
    }

    /// Grows, by half at least, if a row would not have room for the tokens that are to be added to it.
    pub(super) fn make_room(&mut self, added: &[usize]) -> Result<()> {
        let needed = self.lengths.iter().zip(added).map(|(old, new)| old + new).max().unwrap_or(0);
        if needed <= self.capacity {
            return Ok(());
        }
        let (rows, old) = (self.lengths.len() as i64, self.capacity as i64);
        self.capacity = needed + needed / 2;
        for (keys, values) in &mut self.blocks {
            for one in [keys, values] {
                let [_, heads, dim] = one.size()[..] else { continue };
                let wider = one.f_new_zeros([rows, self.capacity as i64, heads, dim], (one.kind(), one.device()))?;
                wider.f_narrow(1, 0, old)?.f_copy_(&one.f_view([rows, old, heads, dim])?)?;
                *one = wider.f_view([-1, heads, dim])?;
            }
        }
        Ok(())
    }

    pub(super) fn lengths(&self) -> &[usize] {
        &self.lengths
    }

    /// The flat slots that new tokens go to, `added[r]` of them in row r.
    pub(super) fn slots(&self, added: &[usize]) -> Vec<i64> {
        (added.iter().enumerate())
            .flat_map(|(row, count)| {
                let start = row * self.capacity + self.lengths[row];
                (start..start + count).map(|slot| slot as i64)
            })
            .collect()
    }

    /// Stores the keys and values of new tokens of a block, and gives those of the first `longest` slots of every row,
    /// `[rows, longest, kv_heads, head_dim]`.
    pub(super) fn extend(
        &mut self,
        block: usize,
        slots: &Tensor,
        new: (&Tensor, &Tensor),
        longest: usize,
    ) -> Result<(Tensor, Tensor)> {
        let (keys, values) = &mut self.blocks[block];
        let _ = keys.f_index_copy_(0, slots, new.0)?;
        let _ = values.f_index_copy_(0, slots, new.1)?;
        let (rows, capacity) = (self.lengths.len() as i64, self.capacity as i64);
        let view = |all: &Tensor| -> Result<Tensor> {
            let size = all.size();
            Ok(all.f_view([rows, capacity, size[1], size[2]])?.f_narrow(1, 0, longest as i64)?)
        };
        Ok((view(keys)?, view(values)?))
    }

    /// Counts new tokens in, once all blocks have stored them.
    pub(super) fn advance(&mut self, added: &[usize]) {
        for (length, count) in self.lengths.iter_mut().zip(added) {
            *length += count;
        }
    }

    /// Keys and values of each block of one row, `[kv_heads, tokens, head_dim]`.
    pub(super) fn of_row(&self, row: usize) -> Result<Vec<(Tensor, Tensor)>> {
        let (start, length) = ((row * self.capacity) as i64, self.lengths[row] as i64);
        let own = |all: &Tensor| all.f_narrow(0, start, length)?.f_transpose(0, 1)?.f_contiguous();
        self.blocks.iter().map(|(keys, values)| Ok((own(keys)?, own(values)?))).collect()
    }

    /// Keeps these rows alone, in this order.
    pub(super) fn keep(&mut self, rows: &[usize]) -> Result<()> {
        let capacity = self.capacity;
        let slots: Vec<i64> =
            rows.iter().flat_map(|row| (row * capacity..(row + 1) * capacity).map(|slot| slot as i64)).collect();
        for (keys, values) in &mut self.blocks {
            let slots = index(&slots, keys.device())?;
            *keys = keys.f_index_select(0, &slots)?;
            *values = values.f_index_select(0, &slots)?;
        }
        self.lengths = rows.iter().map(|row| self.lengths[*row]).collect();
        Ok(())
    }
}
