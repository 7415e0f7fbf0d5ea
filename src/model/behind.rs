//! A model that has read a text already, for many rows that begin with it.

use tch::{Kind, Tensor};

use super::{
    causal_lm::{Adapter, Addition, CausalLm, Hidden, Input, Pass},
    decoder::Decoder,
    earlier::ReadText,
};
use crate::{Error, Layout, Result, tensor};

/// For a model without a cache: puts the text before every row, and takes it away from what comes out.
pub(super) struct Prepended<'a, M: ?Sized> {
    model: &'a M,
    /// The text's un-scaled embeddings `[text, hidden]`.
    text: Tensor,
}

impl<'a, M: CausalLm + ?Sized> Prepended<'a, M> {
    pub(super) fn new(model: &'a M, text: &[i64]) -> Result<Self> {
        check(text, model.vocabulary())?;
        let _guard = tch::no_grad_guard();
        Ok(Self { model, text: model.embed(&tensor::index(text, model.device())?)? })
    }

    fn length(&self) -> usize {
        self.text.size()[0] as usize
    }
}

fn check(text: &[i64], vocabulary: i64) -> Result<()> {
    match text.iter().find(|id| !(0..vocabulary).contains(*id)) {
        Some(id) => Err(Error::mismatch("token id of the text read before", format!("0 to {}", vocabulary - 1), id)),
        None => Ok(()),
    }
}

/// For each token of a layout its packed index once `text` tokens stand before every row.
fn moved(layout: &Layout, text: usize) -> Vec<i64> {
    let rows = layout.rows().iter().enumerate();
    rows.flat_map(|(row, spans)| spans.tokens().map(move |token| (token + (row + 1) * text) as i64)).collect()
}

impl<M: CausalLm + ?Sized> CausalLm for Prepended<'_, M> {
    fn layers(&self) -> usize {
        self.model.layers()
    }

    fn kind(&self) -> Kind {
        self.model.kind()
    }

    fn embedding(&self) -> &Tensor {
        self.model.embedding()
    }

    fn hidden(&self, input: &Input) -> Result<Hidden> {
        let (layout, text) = (input.layout(), self.length());
        let places = moved(layout, text);
        let device = input.embeddings().device();
        let whole = layout.behind(text);
        // The text's embeddings, then the rows': what each token of the whole is taken from.
        let both = Tensor::f_cat(&[&self.text, input.embeddings()], 0)?;
        let sources = layout.rows().iter().flat_map(|row| (0..text).chain(row.tokens().map(|token| text + token)));
        let sources: Vec<i64> = sources.map(|source| source as i64).collect();
        let embeddings = both.f_index_select(0, &tensor::index(&sources, device)?)?;
        let mut outer = Input::of_embeddings(embeddings, &whole, input.pass())?;
        let places = tensor::index(&places, device)?;
        for Addition { block, tokens, values } in input.additions() {
            let tokens = places.f_index_select(0, tokens)?;
            outer.push(Addition { block: *block, tokens, values: values.shallow_clone() });
        }
        let Hidden { last, last_of, tapped } = self.model.hidden(&outer)?;
        let own = |x: &Tensor| -> Result<Tensor> { Ok(x.f_index_select(0, &places)?) };
        let (last, last_of) = match last_of {
            None => (own(&last)?, None),
            Some(of) => {
                let (rows, tokens) = behind_text(layout, text, &of);
                (last.f_index_select(0, &tensor::index(&rows, device)?)?, Some(tokens))
            }
        };
        Ok(Hidden { last, last_of, tapped: tapped.iter().map(own).collect::<Result<_>>()? })
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.model.logits(hidden)
    }

    fn log_odds(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        self.model.log_odds(hidden, ids)
    }

    /// One text behind the other: of the same type, since types cannot nest without end.
    fn behind<'b>(&'b self, text: &[i64]) -> Result<Box<dyn CausalLm + 'b>> {
        let Self { text: more, .. } = Self::new(self.model, text)?;
        Ok(Box::new(Self { model: self.model, text: Tensor::f_cat(&[&self.text, &more], 0)? }))
    }
}

/// Of tokens of the whole, packed indices, those that are not of the text: where each is in the list, and its packed index
/// without the text.
fn behind_text(layout: &Layout, text: usize, of: &[usize]) -> (Vec<i64>, Vec<usize>) {
    let places = moved(layout, text);
    let own = |token: &usize| places.binary_search(&(*token as i64)).ok();
    of.iter().enumerate().filter_map(|(at, token)| Some((at as i64, own(token)?))).unzip()
}

/// A decoder that has read a text: its keys and values are shared by all rows, not copied.
struct Behind<'a> {
    model: &'a Decoder,
    text: ReadText,
    /// For what the keys and values do not serve.
    plain: Prepended<'a, Decoder>,
}

pub(super) fn decoder<'a>(model: &'a Decoder, text: &[i64]) -> Result<Box<dyn CausalLm + 'a>> {
    let plain = Prepended::new(model, text)?;
    if text.is_empty() {
        return Ok(Box::new(plain));
    }
    Ok(Box::new(Behind { model, text: read(model, text)?, plain }))
}

fn read(model: &Decoder, text: &[i64]) -> Result<ReadText> {
    let mut cache = model.new_cache(1)?;
    let layout = Layout::of_lengths(&[text.len()]);
    let embeddings = model.embed(&tensor::index(text, model.device())?)?;
    model.hidden_cached(&Input::of_embeddings(embeddings, &layout, Pass::default())?, &mut cache)?;
    ReadText::of_row(&cache, 0)
}

impl Behind<'_> {
    /// The text was read with the adapter and without dropout, and where rotary factors depend on a text's length, with
    /// those of its own.
    fn serves(&self, input: &Input) -> bool {
        let pass = input.pass();
        let longest = input.layout().rows().iter().map(|row| row.path_len()).max().unwrap_or(0);
        let same_factors = !self.model.switches_between(self.text.length(), self.text.length() + longest);
        pass.adapter == Adapter::On && !pass.dropout && same_factors
    }
}

impl CausalLm for Behind<'_> {
    fn layers(&self) -> usize {
        self.model.layers()
    }

    fn kind(&self) -> Kind {
        self.model.kind()
    }

    fn embedding(&self) -> &Tensor {
        self.model.embedding()
    }

    fn hidden(&self, input: &Input) -> Result<Hidden> {
        if self.serves(input) { self.model.hidden_behind(input, &self.text) } else { self.plain.hidden(input) }
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.model.logits(hidden)
    }

    fn log_odds(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        self.model.log_odds(hidden, ids)
    }
}
