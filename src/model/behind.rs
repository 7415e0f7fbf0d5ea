//! A model that has read a text already, for many rows that begin with it.

use tch::{Kind, Tensor};

use super::{
    cache::KvCache,
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

    /// The same behind another text, of which these are the embeddings.
    fn after(self, text: &Tensor) -> Result<Self> {
        Ok(Self { text: Tensor::f_cat(&[text, &self.text], 0)?, ..self })
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

/// How many tokens of a text of so many each row of an input stands behind.
fn read_before(input: &Input, text: usize) -> Result<Vec<usize>> {
    match input.read() {
        None => Ok(vec![text; input.layout().rows().len()]),
        Some(read) => match read.iter().find(|read| **read > text) {
            Some(beyond) => {
                Err(Error::mismatch("tokens of the text that a row stands behind", format!("at most {text}"), beyond))
            }
            None => Ok(read.to_vec()),
        },
    }
}

/// For each token of a layout its packed index once so many tokens stand before each row.
fn moved(layout: &Layout, read: &[usize]) -> Vec<i64> {
    let mut before = 0;
    let rows = layout.rows().iter().zip(read);
    rows.flat_map(|(row, read)| {
        before += read;
        let moved = before;
        row.tokens().map(move |token| (token + moved) as i64)
    })
    .collect()
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
        let read = read_before(input, text)?;
        let places = moved(layout, &read);
        let device = input.embeddings().device();
        let whole = layout.behind(&read);
        // The text's embeddings, then the rows': what each token of the whole is taken from.
        let both = Tensor::f_cat(&[&self.text, input.embeddings()], 0)?;
        let rows = layout.rows().iter().zip(&read);
        let sources = rows.flat_map(|(row, read)| (0..*read).chain(row.tokens().map(|token| text + token)));
        let sources: Vec<i64> = sources.map(|source| source as i64).collect();
        let embeddings = both.f_index_select(0, &tensor::index(&sources, device)?)?;
        let mut outer = Input::of_embeddings(embeddings, &whole, input.pass())?;
        let own_places = places.clone();
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
                let (rows, tokens) = behind_text(&own_places, &of);
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
        Ok(Box::new(Self::new(self.model, text)?.after(&self.text)?))
    }
}

/// Of tokens of the whole, packed indices, those that are not of the text: where each is in the list, and its packed index
/// without the text. `places` are where the tokens without the text stand in the whole, ascending.
fn behind_text(places: &[i64], of: &[usize]) -> (Vec<i64>, Vec<usize>) {
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
    Ok(Box::new(Behind { model, text: read(model, model.new_cache(1)?, text)?, plain }))
}

/// A text that goes on behind what a cache of one row holds.
fn read(model: &Decoder, mut cache: KvCache, text: &[i64]) -> Result<ReadText> {
    let layout = Layout::of_lengths(&[text.len()]);
    let embeddings = model.embed(&tensor::index(text, model.device())?)?;
    model.hidden_cached(&Input::of_embeddings(embeddings, &layout, Pass::default())?, &mut cache)?;
    ReadText::of_row(&cache, 0)
}

impl Behind<'_> {
    /// The text was read with the adapter and without dropout, and where rotary factors depend on a text's length, with
    /// those of its own.
    fn serves(&self, input: &Input, read: &[usize]) -> bool {
        let (pass, text) = (input.pass(), self.text.length());
        let lengths = input.layout().rows().iter().zip(read).map(|(row, read)| read + row.path_len());
        let (short, long) = lengths.fold((text, text), |(short, long), length| (short.min(length), long.max(length)));
        pass.adapter == Adapter::On && !pass.dropout && !self.model.switches_between(short, long)
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
        let read = read_before(input, self.text.length())?;
        if self.serves(input, &read) {
            self.model.hidden_behind(input, &self.text, read)
        } else {
            self.plain.hidden(input)
        }
    }

    fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.model.logits(hidden)
    }

    fn log_odds(&self, hidden: &Tensor, ids: &Tensor) -> Result<Tensor> {
        self.model.log_odds(hidden, ids)
    }

    fn behind<'b>(&'b self, text: &[i64]) -> Result<Box<dyn CausalLm + 'b>> {
        let plain = Prepended::new(self.model, text)?.after(&self.plain.text)?;
        let (read_already, all) = (self.text.length(), plain.length());
        if text.is_empty() || self.model.switches_between(read_already, all) {
            return Ok(Box::new(plain));
        }
        let text = read(self.model, self.text.as_cache()?, text)?;
        Ok(Box::new(Behind { model: self.model, text, plain }))
    }
}
