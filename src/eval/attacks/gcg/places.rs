//! Where the string stands in each case's conversation, and what the search begins at.

use rand::{Rng, RngExt};

use crate::{Case, ChatFormat, Error, Message, PlacedString, Result, SearchPrompt, StringPlace};

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

    /// What the search begins at: the start, and random strings of as many tokens where the buffer has room for more, as in
    /// nanoGCG, which makes them of punctuation.
    pub(super) fn starts(&self, buffer: usize, allowed: &[i64], random: &mut impl Rng) -> Result<Vec<Vec<i64>>> {
        let mut starts = vec![self.start().to_vec()];
        for _ in 1..buffer {
            starts.push(self.random_string(allowed, random)?);
        }
        Ok(starts)
    }

    /// A random string with as many tokens as the start, each chosen so that all up to it are read back.
    fn random_string(&self, allowed: &[i64], random: &mut impl Rng) -> Result<Vec<i64>> {
        let mut ids = Vec::with_capacity(self.start().len());
        while ids.len() < self.start().len() {
            let mut longer = || -> Result<Option<Vec<i64>>> {
                let next = allowed[random.random_range(0..allowed.len())];
                let longer = [&ids[..], &[next]].concat();
                Ok(self.string_of(&longer)?.is_some().then_some(longer))
            };
            let found = (0..TRIES).map(|_| longer()).find_map(Result::transpose).transpose()?;
            ids = found.ok_or_else(|| {
                let what = "random strings of a search's buffer";
                Error::mismatch(what, "tokens whose text is read as the same tokens", format!("none in {TRIES} tries"))
            })?;
        }
        Ok(ids)
    }
}

/// So many tokens are tried for a place in a random string.
const TRIES: usize = 1000;
