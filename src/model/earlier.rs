//! What the rows of a pass have before them.

use tch::Tensor;

use super::cache::KvCache;
use crate::Result;

/// The tokens before the rows of a pass.
#[derive(Debug)]
pub(super) enum Earlier<'a> {
    /// None: the rows are whole texts.
    Nothing,
    /// Each row's own, to which the new ones are added.
    Cached(&'a mut KvCache),
    /// A text that all rows begin with.
    Text(&'a ReadText),
}

impl Earlier<'_> {
    /// How many earlier tokens each row has.
    pub(super) fn lengths(&self, rows: usize) -> Vec<usize> {
        match self {
            Self::Nothing => vec![0; rows],
            Self::Cached(cache) => cache.lengths().to_vec(),
            Self::Text(text) => vec![text.length(); rows],
        }
    }
}

/// Keys and values of a text that many rows begin with.
#[derive(Debug)]
pub(super) struct ReadText {
    /// Of each block, `[kv_heads, text, head_dim]`.
    blocks: Vec<(Tensor, Tensor)>,
    length: usize,
}

impl ReadText {
    /// What a cache holds of one row.
    pub(super) fn of_row(cache: &KvCache, row: usize) -> Result<Self> {
        Ok(Self { blocks: cache.of_row(row)?, length: cache.lengths()[row] })
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn block(&self, index: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.blocks[index];
        (keys, values)
    }
}
