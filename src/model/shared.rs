//! Rows that begin alike: the tokens that they share are one row, computed once, behind which the others stand.

use tch::Tensor;

use super::causal_lm::{Hidden, Input};
use crate::{Layout, Result, tensor};

/// A layout whose rows begin with the same tokens, taken apart.
pub(super) struct Shared {
    /// What the rows share as a row of its own, then each row without it.
    layout: Layout,
    /// For each token of `layout` its packed index in the whole, ascending.
    origins: Vec<i64>,
    /// For each token of the whole its packed index in `layout`.
    places: Vec<i64>,
}

impl Shared {
    pub(super) fn new(whole: &Layout, tokens: usize) -> Self {
        let (mut origins, mut places) = (Vec::new(), Vec::new());
        for (row, spans) in whole.rows().iter().enumerate() {
            let all = spans.tokens();
            let own = if row == 0 { all.start } else { all.start + tokens };
            places.extend((all.start..own).map(|token| (token - all.start) as i64));
            places.extend((own..all.end).map(|token| (origins.len() + token - own) as i64));
            origins.extend((own..all.end).map(|token| token as i64));
        }
        Self { layout: whole.sharing(tokens), origins, places }
    }

    /// The same pass over these rows.
    pub(super) fn input<'a>(&'a self, whole: &Input<'a>) -> Result<Input<'a>> {
        let embeddings = whole.embeddings();
        let origins = tensor::index(&self.origins, embeddings.device())?;
        Input::of_embeddings(embeddings.f_index_select(0, &origins)?, &self.layout, whole.pass())
    }

    /// What comes out of that pass, for the tokens of the whole.
    pub(super) fn whole(&self, hidden: Hidden) -> Result<Hidden> {
        let places = tensor::index(&self.places, hidden.last.device())?;
        let of_all = |x: &Tensor| -> Result<Tensor> { Ok(x.f_index_select(0, &places)?) };
        let tapped = hidden.tapped.iter().map(of_all).collect::<Result<_>>()?;
        Ok(match hidden.last_of {
            None => Hidden { last: of_all(&hidden.last)?, last_of: None, tapped },
            Some(of) => {
                let of = of.into_iter().map(|token| self.origins[token] as usize).collect();
                Hidden { last: hidden.last, last_of: Some(of), tapped }
            }
        })
    }
}
