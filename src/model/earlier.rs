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
    /// A text that all rows begin with, or a first part of it.
    Text {
        text: &'a ReadText,
        /// How many of its tokens each row has before it.
        read: Vec<usize>,
    },
    /// The first row of the pass, of so many tokens: all others stand behind it.
    FirstRow(usize),
}

impl Earlier<'_> {
    /// How many earlier tokens each row has.
    pub(super) fn lengths(&self, rows: usize) -> Vec<usize> {
        match self {
            Self::Nothing => vec![0; rows],
            Self::Cached(cache) => cache.lengths().to_vec(),
            Self::Text { read, .. } => read.clone(),
            Self::FirstRow(tokens) => (0..rows).map(|row| if row == 0 { 0 } else { *tokens }).collect(),
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

    /// A cache of one row that holds it.
    pub(super) fn as_cache(&self) -> Result<KvCache> {
        KvCache::of_text(&self.blocks, self.length)
    }

    pub(super) fn length(&self) -> usize {
        self.length
    }

    pub(super) fn block(&self, index: usize) -> (&Tensor, &Tensor) {
        let (keys, values) = &self.blocks[index];
        (keys, values)
    }
}
