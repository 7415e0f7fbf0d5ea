//! Which token attends to which, and the padding that attention needs.

use tch::{Device, Tensor};

use super::{cache::KvCache, earlier::Earlier};
use crate::{Layout, Result, RowLayout, tensor::index};

/// How a layout is attended to: made once per pass, shared by all blocks, but for the last where only some tokens go on behind
/// it. Padding exists only in here.
#[derive(Debug)]
pub(super) enum Plan {
    /// Rows of one length, each token sees all before it: a view and the causal kernel.
    Uniform {
        /// Rows, and tokens of each.
        rows: i64,
        length: i64,
    },
    /// Anything else: rows are filled up, a mask says what is seen.
    Padded(Padded),
    /// Only some tokens ask and go on; all are asked.
    Partial {
        /// Packed indices of those that ask, ascending.
        asking: Tensor,
        padded: Padded,
    },
    /// New tokens of rows whose earlier tokens are in a cache.
    Cached {
        queries: Grid,
        /// `[rows, 1, longest, keys]`, true where seen.
        mask: Tensor,
        /// Slots of the cache `[tokens]` that the new tokens go to.
        slots: Tensor,
        /// Slots that the mask spans.
        longest_key: usize,
    },
}

#[derive(Debug)]
pub(super) struct Padded {
    pub(super) queries: Grid,
    pub(super) keys: Grid,
    /// `[rows, 1, most queries of a row, keys]`, true where seen; keys are those of the first row, where others stand behind it, and
    /// the row's own.
    pub(super) mask: Tensor,
    /// Which tokens of a text before the rows are seen, `[rows, 1, most queries of a row, text]`; `None`: all.
    pub(super) text: Option<Tensor>,
}

/// Packed tokens as rows of one length.
#[derive(Debug)]
pub(super) struct Grid {
    rows: i64,
    longest: i64,
    /// For each padded place the packed token that fills it, `[rows * longest]`; padding takes token 0.
    fill: Tensor,
    /// The padded place of each packed token `[tokens]`.
    place: Tensor,
}

impl Plan {
    /// A cache is given room for the new tokens.
    pub(super) fn new(layout: &Layout, earlier: &mut Earlier, window: Option<usize>, device: Device) -> Result<Self> {
        match earlier {
            Earlier::Cached(cache) => Self::cached(layout, cache, window, device),
            Earlier::Nothing if is_uniform(layout, window) => {
                Ok(Self::Uniform { rows: layout.rows().len() as i64, length: layout.longest_row() as i64 })
            }
            earlier => {
                let all: Vec<usize> = (0..layout.tokens()).collect();
                Ok(Self::Padded(Padded::new(layout, &all, earlier, window, device)?))
            }
        }
    }

    /// For a block behind which only some tokens go on: `asking` are their packed indices, ascending.
    pub(super) fn partial(
        layout: &Layout,
        asking: &[usize],
        earlier: &Earlier,
        window: Option<usize>,
        device: Device,
    ) -> Result<Self> {
        let padded = Padded::new(layout, asking, earlier, window, device)?;
        let asking: Vec<i64> = asking.iter().map(|token| *token as i64).collect();
        Ok(Self::Partial { asking: index(&asking, device)?, padded })
    }

    /// For rows of prompts alone whose earlier tokens are in `cache`.
    fn cached(layout: &Layout, cache: &mut KvCache, window: Option<usize>, device: Device) -> Result<Self> {
        let added = layout.lengths();
        cache.make_room(&added)?;
        let longest = layout.longest_row();
        let longest_key = cache.lengths().iter().zip(&added).map(|(old, new)| old + new).max().unwrap_or(0);
        let mut mask = Vec::with_capacity(added.len() * longest * longest_key);
        for old in cache.lengths() {
            for query in 0..longest {
                let position = old + query;
                mask.extend(
                    (0..longest_key).map(|key| key <= position && window.is_none_or(|window| position < key + window)),
                );
            }
        }
        let size = [added.len() as i64, 1, longest as i64, longest_key as i64];
        Ok(Self::Cached {
            queries: Grid::new(&added, 0, device)?,
            mask: Tensor::f_from_slice(&mask)?.f_view(size)?.f_to_device(device)?,
            slots: index(&cache.slots(&added), device)?,
            longest_key,
        })
    }

    /// Of what is `[tokens, …]` the tokens that ask and go on.
    pub(super) fn asking(&self, x: &Tensor) -> Result<Tensor> {
        match self {
            Self::Partial { asking, .. } => Ok(x.f_index_select(0, asking)?),
            _ => Ok(x.shallow_clone()),
        }
    }
}

fn is_uniform(layout: &Layout, window: Option<usize>) -> bool {
    let longest = layout.longest_row();
    let same_length = layout.lengths().iter().all(|length| *length == longest);
    same_length && layout.is_linear() && window.is_none_or(|window| window >= longest)
}

impl Padded {
    fn new(
        layout: &Layout,
        asking: &[usize],
        earlier: &Earlier,
        window: Option<usize>,
        device: Device,
    ) -> Result<Self> {
        let asking = layout.by_row(asking);
        let own = layout.mask(&asking, window, device)?.f_unsqueeze(1)?;
        let seen = |text, read: &[usize]| seen_of_text(layout, &asking, (text, read), window, device);
        let (text, mask, shared) = match earlier {
            Earlier::Text { text, read } if sees_all(layout, (text.length(), read), window) => (None, own, 0),
            Earlier::Text { text, read } => (Some(seen(text.length(), read)?), own, 0),
            Earlier::FirstRow(tokens) => {
                let before = seen(*tokens, &earlier.lengths(layout.rows().len()))?;
                (None, Tensor::f_cat(&[before, own], -1)?, *tokens)
            }
            _ => (None, own, 0),
        };
        Ok(Self {
            text,
            queries: Grid::new(&asking.iter().map(Vec::len).collect::<Vec<_>>(), 0, device)?,
            keys: Grid::new(&layout.lengths(), shared, device)?,
            mask,
        })
    }
}

/// Whether every row sees all of a text of so many tokens, of which so many stand before each.
fn sees_all(layout: &Layout, (text, read): (usize, &[usize]), window: Option<usize>) -> bool {
    let longest = layout.rows().iter().map(RowLayout::path_len).max().unwrap_or(0);
    window.is_none_or(|window| window >= text + longest) && read.iter().all(|read| *read == text)
}

/// Which tokens of a text of so many are seen, `[rows, 1, most queries of a row, text]`: those that stand before the row and are
/// within the window. `queries` are packed indices, of each row its own; padded ones see what its first sees.
fn seen_of_text(
    layout: &Layout,
    queries: &[Vec<usize>],
    (text, read): (usize, &[usize]),
    window: Option<usize>,
    device: Device,
) -> Result<Tensor> {
    let positions = layout.positions();
    let most = queries.iter().map(Vec::len).max().unwrap_or(0);
    let mut mask = Vec::with_capacity(queries.len() * most * text);
    for (queries, read) in queries.iter().zip(read) {
        for at in 0..most {
            let position = queries.get(at).map_or(0, |query| read + positions[*query] as usize);
            mask.extend((0..text).map(|key| key < *read && window.is_none_or(|window| position < key + window)));
        }
    }
    let size = [queries.len() as i64, 1, most as i64, text as i64];
    Ok(Tensor::f_from_slice(&mask)?.f_view(size)?.f_to_device(device)?)
}

impl Grid {
    /// Before the tokens of each row come the first `shared` of all.
    fn new(lengths: &[usize], shared: usize, device: Device) -> Result<Self> {
        let longest = shared + lengths.iter().copied().max().unwrap_or(0);
        let mut fill = vec![0i64; lengths.len() * longest];
        let mut place = Vec::with_capacity(lengths.iter().sum());
        for (row, length) in lengths.iter().enumerate() {
            let start = row * longest;
            for (token, fill) in fill[start..start + shared].iter_mut().enumerate() {
                *fill = token as i64;
            }
            for (at, fill) in fill.iter_mut().enumerate().skip(start + shared).take(*length) {
                *fill = place.len() as i64;
                place.push(at as i64);
            }
        }
        Ok(Self {
            rows: lengths.len() as i64,
            longest: longest as i64,
            fill: index(&fill, device)?,
            place: index(&place, device)?,
        })
    }

    /// `[tokens, heads, dim]` to `[rows, heads, longest, dim]`.
    pub(super) fn pad(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        let padded = x.f_index_select(0, &self.fill)?.f_view([self.rows, self.longest, size[1], size[2]])?;
        Ok(padded.f_transpose(1, 2)?)
    }

    /// `[rows, heads, longest, dim]` to `[tokens, heads * dim]`.
    pub(super) fn unpad(&self, x: &Tensor) -> Result<Tensor> {
        let size = x.size();
        let flat = x.f_transpose(1, 2)?.f_reshape([self.rows * self.longest, size[1] * size[3]])?;
        Ok(flat.f_index_select(0, &self.place)?)
    }
}
