//! Tests of the configuration file and the presets.

use std::collections::BTreeMap;

use serde_json::Value;

use super::*;

#[test]
fn presets_are_valid_and_come_back_whole() {
    for algorithm in [Algorithm::AdvUl, Algorithm::AdvIpo] {
        for preset in [Preset::Published, Preset::Corrected, Preset::Fast, Preset::Small] {
            let config = RunConfig::preset(algorithm, preset, ModelPreset::Zephyr7b);
            config.validate().unwrap();
            let text = config.to_toml().unwrap();
            assert_eq!(RunConfig::from_toml(&text, "a.toml").unwrap(), config, "{text}");
        }
    }
}

#[test]
fn a_wrong_field_is_named() {
    let base = RunConfig::preset(Algorithm::AdvIpo, Preset::Corrected, ModelPreset::Gemma2b).to_toml().unwrap();
    for (old, new, in_message) in [
        ("batch_size = 64", "batchsize = 64", "train.batchsize: unknown field"),
        ("batch_size = 64", "batch_size = 0", "train.batch_size = 0: must be at least 1"),
        ("relative = 0.1", "relative = -0.1", "attack.threat.radius.relative = -0.1: must be above 0"),
        ("beta = 0.25", "beta = 0", "beta"),
        ("max_tokens = 128", "max_tokens = 128\nutility_tokens = 0", "data.utility_tokens = 0: must be at least 1"),
        (
            "[lora]",
            "[data.strings]\nharmful = 0.8\nutility = -0.4\n[lora]",
            "data.strings.utility = -0.4: must be between 0 and 1",
        ),
        ("[lora]", "[data.strings]\nharmful = 0.8\n[lora]", "data.strings: missing field `utility`"),
        ("dtype = \"auto\"", "dtype = \"float16\"", "model.dtype = float16: must be auto, bfloat16 or float32"),
        ("rank = 64", "rank = \"many\"", "lora.rank: invalid type"),
    ] {
        assert!(base.contains(old), "{base}");
        let error = RunConfig::from_toml(&base.replacen(old, new, 1), "run.toml").unwrap_err().to_string();
        assert!(error.contains(in_message), "{error}");
        assert!(error.contains("run.toml"), "{error}");
    }
}

const SHARED: &[(&str, &str)] = &[
    ("attack.threat.bounded", "true"),
    ("attack.threat.norm", "\"l2\""),
    ("attack.threat.radius.relative", "0.075"),
    ("attack.threat.region", "\"prompt\""),
    ("attack.threat.rows", "\"harmful\""),
    ("attack.threat.sites", "[\"embeddings\"]"),
    ("attack_settings.iterate", "\"last\""),
    ("attack_settings.restarts", "1"),
    ("attack_settings.start", "\"zero\""),
    ("lora.alpha", "16.0"),
    ("lora.dropout", "0.1"),
    ("lora.rank", "64"),
    ("lora.rank_stabilised", "false"),
    ("lora.target_modules", "[]"),
    ("model.dtype", "\"auto\""),
    ("train.batch_size", "64"),
    ("train.checkpoint_every", "20"),
    ("train.dropout", "true"),
    ("train.keep_checkpoints", "2"),
    ("train.micro_batch_size", "8"),
    ("train.optimizer.beta1", "0.9"),
    ("train.optimizer.beta2", "0.999"),
    ("train.optimizer.epsilon", "1e-8"),
    ("train.optimizer.learning_rate", "0.0002"),
    ("train.optimizer.max_gradient_norm", "0.3"),
    ("train.optimizer.weight_decay", "0.001"),
    ("train.schedule.shape", "\"cosine\""),
    ("train.seed", "0"),
    ("utility.against", "\"tokens\""),
    ("utility.first_weight", "0.0"),
    ("utility.weight", "1.0"),
];

const ADV_UL: &[(&str, &str)] = &[
    ("data.max_tokens", "256"),
    ("loss.adv_ul.away", "\"negative_cross_entropy\""),
    ("loss.adv_ul.away_cut_off.slope", "0.001"),
    ("loss.adv_ul.away_cut_off.threshold", "-5.0"),
    ("loss.adv_ul.away_weight", "0.5"),
    ("loss.adv_ul.toward_cut_off.slope", "0.001"),
    ("loss.adv_ul.toward_cut_off.threshold", "0.5"),
    ("loss.adv_ul.toward_weight", "0.5"),
    ("train.epochs", "5"),
    ("train.utility_share", "0.875"),
];

const ADV_IPO: &[(&str, &str)] = &[
    ("data.max_tokens", "128"),
    ("loss.adv_ipo.beta", "0.25"),
    ("loss.adv_ipo.form", "\"ipo\""),
    ("loss.adv_ipo.harmful_floor.value", "-5.0"),
    ("loss.adv_ipo.length", "\"mean\""),
    ("loss.adv_ipo.weight", "1.0"),
    ("train.epochs", "20"),
    ("train.utility_share", "0.0"),
];

const TEN_SIGNS: &[(&str, &str)] =
    &[("attack.rule", "\"sign\""), ("attack.steps", "10"), ("attack_settings.warm_start", "false")];

const FEW_ROOTS: &[(&str, &str)] = &[
    ("attack.rule", "\"root\""),
    ("attack.steps", "3"),
    ("attack.momentum.decay", "0.5"),
    ("attack_settings.warm_start", "true"),
];

const PUBLISHED: &[(&str, &str)] = &[
    ("attack.size.absolute", "0.0001"),
    ("attack_settings.dropout", "true"),
    ("data.ended_targets", "true"),
    ("data.turns", "\"last\""),
    ("train.grouping", "\"as_drawn\""),
    ("train.reduction", "\"micro_batch\""),
    ("train.schedule.warm_up", "0.0"),
];

const CORRECTED: &[(&str, &str)] = &[
    ("attack.size.decaying", "1.0"),
    ("attack_settings.dropout", "false"),
    ("data.ended_targets", "false"),
    ("data.turns", "\"all\""),
    ("train.grouping", "\"by_length\""),
    ("train.reduction", "\"per_row\""),
    ("train.schedule.warm_up", "0.03"),
];

/// Where `small` differs from `corrected`.
const SMALL: &[(&str, &str)] = &[
    ("attack.momentum.decay", "0.9"),
    ("attack.rule", "\"l2\""),
    ("attack.threat.radius.relative", "0.1"),
    ("attack_settings.start", "\"uniform\""),
    ("data.max_tokens", "256"),
    ("data.strings.harmful", "0.25"),
    ("data.strings.utility", "0.25"),
    ("data.utility_tokens", "32"),
    ("lora.dropout", "0.0"),
    ("train.epochs", "100"),
    ("train.max_updates", "300"),
    ("train.micro_batch_size", "16"),
    ("train.optimizer.learning_rate", "0.0005"),
    ("utility.against", "\"reference\""),
    ("utility.first_weight", "1.0"),
    ("utility.weight", "3.0"),
];

const SMALL_ADV_UL: &[(&str, &str)] =
    &[("loss.adv_ul.away_cut_off.threshold", "-4.0"), ("loss.adv_ul.toward_cut_off.threshold", "0.05")];

const SMALL_ADV_IPO: &[(&str, &str)] =
    &[("loss.adv_ipo.beta", "0.085"), ("loss.adv_ipo.weight", "0.085"), ("train.utility_share", "0.875")];

/// Every field of a configuration, by its full name.
fn fields(value: &Value, name: &str, into: &mut BTreeMap<String, String>) {
    match value {
        Value::Object(map) => {
            let dot = if name.is_empty() { "" } else { "." };
            map.iter().for_each(|(key, value)| fields(value, &format!("{name}{dot}{key}"), into));
        }
        value => _ = into.insert(name.to_string(), value.to_string()),
    }
}

/// The paper's hyper-parameters and the choices of its authors' implementation, field by field, and no other field.
#[test]
fn presets_hold_the_papers_numbers_and_differ_where_they_should() {
    let cut_offs: fn(&str) -> Vec<(&str, &str)> =
        |form| vec![("loss.adv_ul.away_cut_off.form", form), ("loss.adv_ul.toward_cut_off.form", form)];
    let floor: fn(&str) -> Vec<(&str, &str)> = |form| vec![("loss.adv_ipo.harmful_floor.form", form)];
    let continuous = || cut_offs("\"continuous\"");
    let clamp = || floor("\"clamp\"");
    // Later parts win.
    for (algorithm, preset, parts, forms) in [
        (Algorithm::AdvUl, Preset::Published, vec![SHARED, ADV_UL, TEN_SIGNS, PUBLISHED], cut_offs("\"jumping\"")),
        (Algorithm::AdvUl, Preset::Corrected, vec![SHARED, ADV_UL, TEN_SIGNS, CORRECTED], continuous()),
        (Algorithm::AdvUl, Preset::Fast, vec![SHARED, ADV_UL, FEW_ROOTS, CORRECTED], continuous()),
        (
            Algorithm::AdvUl,
            Preset::Small,
            vec![SHARED, ADV_UL, TEN_SIGNS, CORRECTED, SMALL, SMALL_ADV_UL],
            continuous(),
        ),
        (Algorithm::AdvIpo, Preset::Published, vec![SHARED, ADV_IPO, TEN_SIGNS, PUBLISHED], floor("\"zero\"")),
        (Algorithm::AdvIpo, Preset::Corrected, vec![SHARED, ADV_IPO, TEN_SIGNS, CORRECTED], clamp()),
        (Algorithm::AdvIpo, Preset::Fast, vec![SHARED, ADV_IPO, FEW_ROOTS, CORRECTED], clamp()),
        (Algorithm::AdvIpo, Preset::Small, vec![SHARED, ADV_IPO, TEN_SIGNS, CORRECTED, SMALL, SMALL_ADV_IPO], clamp()),
    ] {
        let config = RunConfig::preset(algorithm, preset, ModelPreset::Zephyr7b);
        let mut found = BTreeMap::new();
        fields(&serde_json::to_value(config).unwrap(), "", &mut found);
        let expected = parts.concat().into_iter().chain(forms);
        let expected: BTreeMap<_, _> = expected.map(|(name, value)| (name.to_string(), value.to_string())).collect();
        assert_eq!(found, expected, "{algorithm:?}, {preset:?}");
    }
}

#[test]
fn the_models_of_the_paper_have_its_radii() {
    use ModelPreset::{Gemma2b, Llama2_7b, Mistral7b, Phi3Mini, Zephyr7b};
    for (model, radius) in [(Gemma2b, 0.1), (Phi3Mini, 0.1), (Mistral7b, 0.05), (Zephyr7b, 0.075), (Llama2_7b, 0.05)] {
        let config = RunConfig::preset(Algorithm::AdvIpo, Preset::Published, model);
        assert_eq!(config.attack.unwrap().threat.radius, Radius::Relative(radius), "{model:?}");
    }
}
