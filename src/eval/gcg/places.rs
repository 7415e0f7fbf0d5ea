//! Where the string stands in each case's conversation, and what the search begins at.

use rand::{Rng, RngExt};

use super::{super::case::Case, GcgSettings};
use crate::{ChatFormat, Error, Message, PlacedString, Result, SearchPrompt, StringPlace};

/// Where the string stands in one case's conversation.
pub(super) struct Place {
    place: StringPlace,
    placed: PlacedString,
}

/// The places of one string behind the behaviours of several cases, at least one.
pub(super) struct Places<'s> {
    format: &'s ChatFormat,
    places: Vec<Place>,
}

impl<'s> Places<'s> {
    /// # Errors
    /// If there is no case, or the start is not read as the same tokens behind all of them.
    pub(super) fn new(format: &'s ChatFormat, cases: &[Case], start: &str) -> Result<Self> {
        let place = |case: &Case| {
            let place = StringPlace::new(case.messages.clone(), "")?;
            let placed = place.encode(format, start)?;
            Ok(Place { place, placed })
        };
        let places = cases.iter().map(place).collect::<Result<Vec<_>>>()?;
        let Some(first) = places.first() else {
            return Err(Error::mismatch("cases of a search", "at least one", 0));
        };
        match cases.iter().zip(&places).find(|(_, place)| place.placed.string != first.placed.string) {
            None => Ok(Self { format, places }),
            Some((case, place)) => {
                let (here, there) = (&place.placed.string, &first.placed.string);
                let message = format!("gcg.start is read as {here:?} behind it, and as {there:?} behind another case");
                Err(Error::example(&case.id, message))
            }
        }
    }

    /// The start's own tokens.
    pub(super) fn start(&self) -> &[i64] {
        &self.places[0].placed.string
    }

    pub(super) fn prompts(&self, cases: &[Case], start: &str) -> Result<Vec<SearchPrompt>> {
        let prompt = |(case, Place { place, placed }): (&Case, &Place)| {
            let opening = self.format.opening(&place.messages(start), &case.target)?;
            let target = opening.continuation.ids().to_vec();
            Ok(SearchPrompt { before: placed.before.clone(), behind: placed.behind.clone(), target })
        };
        cases.iter().zip(&self.places).map(prompt).collect()
    }

    /// The conversations with a string, one for each case.
    pub(super) fn messages(&self, string: &str) -> Vec<Vec<Message>> {
        self.places.iter().map(|place| place.place.messages(string)).collect()
    }

    /// The conversation of one case with a string.
    pub(super) fn messages_of(&self, case: usize, string: &str) -> Vec<Message> {
        self.places[case].place.messages(string)
    }

    /// The string that these tokens are read as behind every behaviour; `None` if there is no such one.
    pub(super) fn string_of(&self, ids: &[i64]) -> Result<Option<String>> {
        let mut found: Option<String> = None;
        for Place { place, placed } in &self.places {
            match place.string_of(self.format, placed, ids)? {
                Some(string) if found.as_ref().is_none_or(|found| *found == string) => found = Some(string),
                _ => return Ok(None),
            }
        }
        Ok(found)
    }

    /// What the search begins at: the start, and random texts of as many tokens where the buffer has room for more, as in
    /// nanoGCG.
    pub(super) fn starts(&self, settings: &GcgSettings, random: &mut impl Rng) -> Result<Vec<Vec<i64>>> {
        let mut starts = vec![self.start().to_vec()];
        for _ in 1..settings.search.buffer {
            let drawn = (0..TRIES).map(|_| self.draw(random)).find_map(Result::transpose).transpose()?;
            starts.push(drawn.ok_or_else(|| {
                let allowed = "0 or 1 for this tokenizer, which has no token for many a single sign";
                Error::setting("gcg.search.buffer", settings.search.buffer, allowed)
            })?);
        }
        Ok(starts)
    }

    /// A random text with as many tokens as the start; `None` if it has another number.
    fn draw(&self, random: &mut impl Rng) -> Result<Option<Vec<i64>>> {
        let length = self.start().len();
        let text: String =
            (0..length).flat_map(|_| [' ', char::from(SIGNS[random.random_range(0..SIGNS.len())])]).collect();
        let Place { place, .. } = &self.places[0];
        let ids = place.encode(self.format, &text)?.string;
        Ok((ids.len() == length && self.string_of(&ids)?.is_some()).then_some(ids))
    }
}

/// Of which random texts are made: what most tokenizers have a token for, with a space before it.
const SIGNS: &[u8] = b".,!?;:()[]{}@#$%&*wxyz";

/// So many random texts are tried for one of the right number of tokens.
const TRIES: usize = 100;
