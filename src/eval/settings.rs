//! All settings of an evaluation's attacks in one file.

use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{
    AttackSettings, AutoDanSettings, ContinuousSettings, DirectSettings, EndpointSettings, Error, GcgSettings, Iterate,
    PairSettings, Pgd, Result, ThreatModel, TokenSearchSettings, files,
};

/// How each attack of an evaluation searches, and how answers are made. One TOML file holds it.
///
/// | Name | Default | Purpose | Range |
/// |---|---|---|---|
/// | `max_new_tokens` | by preset | longest answer | at least 1 |
/// | `rows` | 16 | texts that are computed together: what memory allows | at least 1 |
/// | `direct` | one answer | the plain request ([`DirectSettings`]) | nothing given |
/// | `prefill` | 5 words | the plain request with the beginning of its answer given | at least one word |
/// | `gcg`, `autodan`, `pair` | by preset | [`GcgSettings`], [`AutoDanSettings`], [`PairSettings`] | |
/// | `embedding` | three | embedding attacks ([`ContinuousSettings`]) | each with a name of its own |
/// | `endpoint` | [`EndpointSettings`] | how helping models behind HTTP are asked | |
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvaluationSettings {
    /// Longest answer, in tokens.
    pub max_new_tokens: usize,
    /// Texts that are computed together.
    pub rows: usize,
    /// The plain request.
    pub direct: DirectSettings,
    /// The plain request with the beginning of its answer given.
    pub prefill: DirectSettings,
    /// GCG.
    pub gcg: GcgSettings,
    /// AutoDAN.
    pub autodan: AutoDanSettings,
    /// PAIR.
    pub pair: PairSettings,
    /// Embedding attacks: inside the ball, and without one.
    pub embedding: Vec<ContinuousSettings>,
    /// How helping models behind HTTP are asked; which ones is not for a file of settings to say.
    #[serde(default)]
    pub endpoint: EndpointSettings,
}

/// How much an evaluation costs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EvaluationPreset {
    /// HarmBench's settings of GCG, AutoDAN and PAIR.
    Full,
    /// GCG of 50 steps and 64 candidates, asked every 10 steps, AutoDAN of 10 generations and 16 texts, PAIR of 4 streams, 2
    /// steps and one retry, answers of 128 tokens: for small machines, and to be named as that wherever its figures are.
    Reduced,
}

impl EvaluationSettings {
    /// The settings of a preset, with the threat set of the embedding attacks.
    pub fn preset(preset: EvaluationPreset, threat: &ThreatModel) -> Self {
        let full = Self {
            max_new_tokens: 512,
            rows: 16,
            direct: DirectSettings::default(),
            prefill: DirectSettings { prefill: 5, ..DirectSettings::default() },
            gcg: GcgSettings::harmbench(),
            autodan: AutoDanSettings::default(),
            pair: PairSettings::default(),
            embedding: embedding(threat),
            endpoint: EndpointSettings::default(),
        };
        match preset {
            EvaluationPreset::Full => full,
            EvaluationPreset::Reduced => Self {
                max_new_tokens: 128,
                gcg: GcgSettings {
                    steps: 50,
                    search: TokenSearchSettings { width: 64, ..full.gcg.search },
                    check_every: 10,
                    ..full.gcg
                },
                autodan: AutoDanSettings { steps: 10, population: 16, ..full.autodan },
                pair: PairSettings { streams: 4, steps: 2, retries: 1, ..full.pair },
                ..full
            },
        }
    }

    /// Checks every attack's settings.
    ///
    /// # Errors
    /// Names the first setting out of range, its value and what is allowed.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in [("max_new_tokens", self.max_new_tokens), ("rows", self.rows)] {
            Error::check_count(name, value)?;
        }
        self.direct.validate()?;
        if self.direct.prefill > 0 {
            let allowed = "0: words are given in the section prefill";
            return Err(Error::setting("direct.prefill", self.direct.prefill, allowed));
        }
        self.prefill.validate().map_err(|error| error.with_field(|field| field.replacen("direct", "prefill", 1)))?;
        Error::check_count("prefill.prefill", self.prefill.prefill)?;
        self.gcg.validate()?;
        self.autodan.validate()?;
        self.pair.validate()?;
        self.validate_embedding()?;
        self.endpoint.validate()
    }

    fn validate_embedding(&self) -> Result<()> {
        let mut names = vec!["direct", "prefill", "gcg", "autodan", "autodan-hga", "pair"];
        for (at, settings) in self.embedding.iter().enumerate() {
            let section = format!("embedding[{at}]");
            settings.validate().map_err(|error| error.with_field(|field| field.replacen("embedding", &section, 1)))?;
            let name = settings.name.as_str();
            if names.contains(&name) {
                let allowed = "a name that no other attack has";
                return Err(Error::setting(format!("{section}.name"), format!("{name:?}"), allowed));
            }
            names.push(name);
        }
        Ok(())
    }

    /// Reads a TOML file.
    ///
    /// # Errors
    /// If the file cannot be read, a field is missing, unknown or of the wrong type, or a setting is out of range; each
    /// message names the field.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let settings: Self = files::parse_toml(&files::read_text(path)?, path)?;
        settings.validate().map_err(|error| error.while_doing(format!("reading {}", path.display())))?;
        Ok(settings)
    }

    /// As TOML.
    ///
    /// # Errors
    /// If a value cannot be written as TOML.
    pub fn to_toml(&self) -> Result<String> {
        toml::to_string(self).map_err(|error| Error::mismatch("settings as TOML", "values that TOML has", error))
    }
}

/// The attack that measures robustness (method of Xhonneux et al., section 4) on the prompt and on a suffix, and one
/// without a ball that should break any model: where it does not, gradients are masked. One such check is enough, and
/// it is on the prompt: there it has every token to move.
fn embedding(threat: &ThreatModel) -> Vec<ContinuousSettings> {
    let inside = |name: &str, suffix: Option<String>| ContinuousSettings {
        name: name.into(),
        attack: Pgd::measuring(ThreatModel { bounded: true, ..threat.clone() }),
        around: AttackSettings::measuring(),
        suffix,
        seed: 0,
    };
    let mut unbounded = Pgd::measuring(ThreatModel { bounded: false, ..threat.clone() });
    unbounded.steps *= AttackSettings::measuring().restarts;
    vec![
        inside("embedding", None),
        inside("embedding-suffix", Some(" !".repeat(20))),
        ContinuousSettings {
            name: "embedding-unbounded".into(),
            attack: unbounded,
            around: AttackSettings { iterate: Iterate::Best, ..AttackSettings::default() },
            suffix: None,
            seed: 0,
        },
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn full() -> EvaluationSettings {
        EvaluationSettings::preset(EvaluationPreset::Full, &ThreatModel::default())
    }

    #[test]
    fn presets_survive_toml() {
        for preset in [EvaluationPreset::Full, EvaluationPreset::Reduced] {
            let settings = EvaluationSettings::preset(preset, &ThreatModel::default());
            settings.validate().unwrap();
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("evaluation.toml");
            std::fs::write(&path, settings.to_toml().unwrap()).unwrap();
            assert_eq!(EvaluationSettings::read(&path).unwrap(), settings);
            std::fs::write(&path, settings.to_toml().unwrap().replace("width = ", "widht = ")).unwrap();
            let message = EvaluationSettings::read(&path).unwrap_err().to_string();
            assert!(message.contains("gcg.search") && message.contains("widht"), "{message}");
        }
    }

    #[test]
    fn errors_name_the_section_of_the_file() {
        type Change = fn(&mut EvaluationSettings);
        let changes: [(&str, Change); 9] = [
            ("direct.prefill", |settings| settings.direct.prefill = 1),
            ("prefill.samples", |settings| settings.prefill.samples = 0),
            ("prefill.prefill", |settings| settings.prefill.prefill = 0),
            ("embedding[1].attack.steps", |settings| settings.embedding[1].attack.steps = 0),
            ("embedding[1].around.restarts", |settings| settings.embedding[1].around.restarts = 0),
            ("embedding[0].around.warm_start", |settings| settings.embedding[0].around.warm_start = true),
            ("embedding[2].name", |settings| settings.embedding[2].name = "embedding".into()),
            ("embedding[2].name", |settings| settings.embedding[2].name = " ".into()),
            ("endpoint.max_requests", |settings| settings.endpoint.max_requests = 0),
        ];
        for (field, change) in changes {
            let mut settings = full();
            change(&mut settings);
            let message = settings.validate().unwrap_err().to_string();
            assert!(message.starts_with(&format!("{field} = ")), "{message}");
        }
    }
}
