//! Text to token ids and back, from the files of a model folder.

use std::{
    collections::BTreeSet,
    fs,
    ops::Range,
    path::{Path, PathBuf},
};

use tokenizers::{PostProcessorWrapper, Tokenizer as Inner};

use super::special_tokens::{SpecialTokens, read_json, stop_ids};
use crate::{Error, Result, files};

/// The files that [`Tokenizer::save`] copies when the tokenizer came from a folder.
const FILES: [&str; 9] = [
    TOKENIZER_FILE,
    // For readers of older formats; nothing here reads them.
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    CONFIG_FILE,
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
];
const TOKENIZER_FILE: &str = "tokenizer.json";
const CONFIG_FILE: &str = "tokenizer_config.json";

/// A token and the bytes of the text that it stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenSpan {
    /// The token id.
    pub id: i64,
    /// Byte range in the text that was encoded. A token that the tokenizer put in front of a text ("▁" of the SentencePiece
    /// kind) has the bytes of the character behind it.
    pub bytes: Range<usize>,
}

/// The tokenizer of a model: no truncation, no padding, and never a special token that the text does not hold.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Inner,
    special: SpecialTokens,
    end_ids: Vec<i64>,
    origin: Origin,
}

/// Where [`Tokenizer::save`] takes the files from.
#[derive(Clone, Debug)]
enum Origin {
    Folder(PathBuf),
    /// The text of tokenizer.json.
    Memory(String),
}

impl Tokenizer {
    /// Loads `tokenizer.json` of a model folder, with the special tokens of `tokenizer_config.json` (and of
    /// `special_tokens_map.json` for those missing there) and the ids at which `generation_config.json` and `config.json`
    /// stop. All but the first are optional.
    ///
    /// # Errors
    /// If a file cannot be read or parsed, or a special token is not in the vocabulary.
    pub fn load(folder: impl AsRef<Path>) -> Result<Self> {
        let folder = folder.as_ref();
        let path = folder.join(TOKENIZER_FILE);
        let bytes = fs::read(&path).map_err(|source| Error::io(&path, source))?;
        let inner = Inner::from_bytes(&bytes)
            .map_err(|error| Error::file(&path, format!("not a tokenizer that this build reads: {error}")))?;
        let special = SpecialTokens::load(folder)?;
        let mut end_ids = Vec::new();
        for name in ["generation_config.json", "config.json"] {
            let path = folder.join(name);
            if let Some(config) = read_json(&path)? {
                end_ids.extend(stop_ids(&path, &config)?);
            }
        }
        Self::assemble(inner, special, end_ids, Origin::Folder(folder.to_path_buf()))
    }

    /// Wraps a tokenizer that was built or trained in memory.
    ///
    /// # Errors
    /// If a special token is not in the vocabulary, or the tokenizer cannot be written as JSON.
    pub fn from_parts(inner: Inner, special: SpecialTokens) -> Result<Self> {
        let json = inner
            .to_string(true)
            .map_err(|error| Error::file(TOKENIZER_FILE, format!("cannot write the tokenizer as JSON: {error}")))?;
        Self::assemble(inner, special, Vec::new(), Origin::Memory(json))
    }

    fn assemble(mut inner: Inner, special: SpecialTokens, mut end_ids: Vec<i64>, origin: Origin) -> Result<Self> {
        let path = match &origin {
            Origin::Folder(folder) => folder.join(TOKENIZER_FILE),
            Origin::Memory(_) => PathBuf::from(TOKENIZER_FILE),
        };
        inner
            .with_truncation(None)
            .map_err(|error| Error::file(&path, format!("cannot switch truncation off: {error}")))?;
        inner.with_padding(None);
        // Post-processors add special tokens, which templates do here, and trim spaces off offsets, which would move the
        // border between prompt and answer.
        inner.with_post_processor(None::<PostProcessorWrapper>);
        for (name, token) in special.iter() {
            if inner.token_to_id(token).is_none() {
                let message = format!("{name} = {token:?} is not in the vocabulary; it must be one of its tokens");
                return Err(Error::file(path, message));
            }
        }
        end_ids.extend(special.get("eos_token").and_then(|token| inner.token_to_id(token)).map(i64::from));
        let mut seen = std::collections::HashSet::new();
        end_ids.retain(|id| seen.insert(*id));
        Ok(Self { inner, special, end_ids, origin })
    }

    /// Writes the tokenizer's files into a folder, made if it is not there: a copy of the files it was loaded from, or
    /// `tokenizer.json` and `tokenizer_config.json` for one built in memory. Files of an older tokenizer that this one does
    /// not have (its chat template or generation config, say) are removed.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        match &self.origin {
            Origin::Folder(origin) => copy_files(origin, folder),
            Origin::Memory(json) => {
                files::write(&folder.join(TOKENIZER_FILE), json.as_bytes())?;
                let config = format!("{:#}\n", self.special.to_config());
                files::write(&folder.join(CONFIG_FILE), config.as_bytes())?;
                let written = [TOKENIZER_FILE, CONFIG_FILE];
                FILES
                    .iter()
                    .filter(|name| !written.contains(name))
                    .try_for_each(|name| files::remove(&folder.join(name)))
            }
        }
    }

    /// The ids of a text. Special tokens that the text spells out are recognised; none is added.
    ///
    /// # Errors
    /// If the tokenizer's model refuses the text.
    pub fn encode(&self, text: &str) -> Result<Vec<i64>> {
        Ok(self.encode_with_offsets(text)?.into_iter().map(|token| token.id).collect())
    }

    /// As [`Tokenizer::encode`], with the bytes that each token stands for.
    ///
    /// # Errors
    /// If the tokenizer's model refuses the text.
    pub fn encode_with_offsets(&self, text: &str) -> Result<Vec<TokenSpan>> {
        let encoding =
            self.inner.encode(text, false).map_err(|error| self.refused(format!("cannot encode {text:?}: {error}")))?;
        let spans = encoding.get_offsets().iter();
        let tokens = encoding.get_ids().iter().zip(spans);
        Ok(tokens.map(|(&id, &(start, end))| TokenSpan { id: i64::from(id), bytes: start..end }).collect())
    }

    /// The text of token ids; with `skip_special`, special tokens are left out. Ids past the vocabulary, which a model with
    /// a padded embedding can produce, stand for no text.
    ///
    /// # Errors
    /// If an id is negative or past 32 bits, or the decoder refuses the tokens.
    pub fn decode(&self, ids: &[i64], skip_special: bool) -> Result<String> {
        let narrow = |&id: &i64| {
            u32::try_from(id)
                .map_err(|_| self.refused(format!("token id {id}: ids are numbers from 0 to {}", u32::MAX)))
        };
        let ids = ids.iter().map(narrow).collect::<Result<Vec<u32>>>()?;
        self.inner
            .decode(&ids, skip_special)
            .map_err(|error| self.refused(format!("cannot decode {} ids: {error}", ids.len())))
    }

    fn refused(&self, message: String) -> Error {
        match &self.origin {
            Origin::Folder(folder) => Error::file(folder.join(TOKENIZER_FILE), message),
            Origin::Memory(_) => Error::file(TOKENIZER_FILE, message),
        }
    }

    /// The texts that are read as added tokens wherever they stand, special ones among them, sorted.
    pub fn added_texts(&self) -> Vec<String> {
        let added = self.inner.get_added_tokens_decoder();
        let mut texts: Vec<String> = added.into_values().map(|token| token.content).collect();
        texts.sort();
        texts
    }

    /// Whether the text that ids stand for is read as the same ids again.
    ///
    /// # Errors
    /// If the tokenizer refuses the ids or their text.
    pub fn reads_back(&self, ids: &[i64]) -> Result<bool> {
        Ok(self.encode(&self.decode(ids, false)?)? == ids)
    }

    /// The ids that a search for readable strings may use: those of the vocabulary that are no added tokens and stand for
    /// text that is printable, and with `ascii_only` ASCII.
    ///
    /// # Errors
    /// If the decoder refuses a token.
    pub fn printable_ids(&self, ascii_only: bool) -> Result<Vec<i64>> {
        let added = self.inner.get_added_tokens_decoder();
        let ids: BTreeSet<u32> = self.inner.get_vocab(true).into_values().collect();
        let ids = ids.into_iter().filter(|id| !added.contains_key(id));
        let mut printable = Vec::new();
        for id in ids.map(i64::from) {
            let text = self.decode(&[id], false)?;
            let shown = |c: char| !c.is_control() && c != char::REPLACEMENT_CHARACTER && (c.is_ascii() || !ascii_only);
            if !text.is_empty() && text.chars().all(shown) {
                printable.push(id);
            }
        }
        Ok(printable)
    }

    /// Whether an id is an added token that is marked as special.
    pub fn is_special(&self, id: i64) -> bool {
        self.token_of(id).is_some_and(|token| self.inner.get_added_vocabulary().is_special_token(&token))
    }

    /// The ids at which generation stops, without repetition: those of `generation_config.json`, of `config.json`, and the
    /// tokenizer's end-of-sequence token.
    pub fn end_ids(&self) -> &[i64] {
        &self.end_ids
    }

    /// The named special tokens, as templates see them.
    pub fn special_tokens(&self) -> &SpecialTokens {
        &self.special
    }

    /// The begin-of-sequence token, if there is one.
    pub fn bos_token(&self) -> Option<&str> {
        self.special.get("bos_token")
    }

    /// The end-of-sequence token, if there is one.
    pub fn eos_token(&self) -> Option<&str> {
        self.special.get("eos_token")
    }

    /// How many tokens there are, added ones included. A model's embedding may have more rows.
    pub fn vocabulary_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of a token, spelled as in the vocabulary.
    pub fn id_of(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// The token of an id, spelled as in the vocabulary.
    pub fn token_of(&self, id: i64) -> Option<String> {
        self.inner.id_to_token(u32::try_from(id).ok()?)
    }
}

fn copy_files(from: &Path, to: &Path) -> Result<()> {
    for name in FILES {
        let (source, target) = (from.join(name), to.join(name));
        if !source.exists() {
            files::remove(&target)?;
            continue;
        }
        // Read whole before writing: the two may be the same file.
        let bytes = fs::read(&source).map_err(|error| Error::io(&source, error))?;
        files::write(&target, &bytes)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "tokenizer_tests.rs"]
mod tests;
