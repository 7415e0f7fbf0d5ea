//! Attacks chat models, judges what they say, measures what they are still good for, and writes one report.
//!
//! ```sh
//! cargo run --release --example evaluate
//! cargo run --release --example evaluate -- --model path/to/model --behaviors behaviors.csv --targets targets.json \
//!     --attacks direct,gcg,autodan,embedding --xstest xstest.csv --out runs/evaluation-model
//! cargo run --release --example evaluate -- --model path/to/model --adapter runs/advipo/adapter … \
//!     --with runs/evaluation-model --out runs/evaluation-hardened
//! ```
//!
//! Without arguments it hardens the toy of `advipo_gemma`, if that has not been done, and evaluates it before and after. PAIR's
//! attacker is then the toy itself, which cannot write such prompts: that only shows that everything works.
//!
//! Ctrl-C stops between two steps, with exit code 130; the same command goes on from there.

mod support;

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use advtrain::{
    Case, ChatFormat, Decoder, Dtype, Evaluation, EvaluationPreset, EvaluationSettings, Finish, Generation, Report,
    Setup, Subject, ThreatModel, device, load_behaviors, load_targets,
};
use anyhow::{Context, Result, bail};
use clap::Parser;
use support::{
    arguments::Arguments as TrainingArguments,
    assembly::{self, AttackName, Helpers, UtilityFiles},
    inputs::spread,
    job::{self, STOP},
    toy, watching,
};

/// Attacks chat models and measures what they are still good for. Without arguments: the toy, before and after.
///
/// Exit codes: 0 done, 1 an error, 130 stopped by Ctrl-C; the same command then goes on.
#[derive(Clone, Debug, Parser)]
struct Arguments {
    /// A Hugging Face model folder
    #[arg(long, requires_all = ["behaviors", "targets"])]
    model: Option<PathBuf>,
    /// A PEFT adapter's folder
    #[arg(long, requires = "model")]
    adapter: Option<PathBuf>,
    /// The model's name in the report; without, its folder's
    #[arg(long)]
    name: Option<String>,
    /// CSV with the columns Behavior and BehaviorID (HarmBench)
    #[arg(long, requires = "model")]
    behaviors: Option<PathBuf>,
    /// JSON from behaviour id to a list of targets (HarmBench)
    #[arg(long, requires = "model")]
    targets: Option<PathBuf>,
    /// Attack behaviours of this FunctionalCategory alone (HarmBench: standard, contextual)
    #[arg(long)]
    category: Option<String>,
    /// Attack so many behaviours, at even distances in the file
    #[arg(long)]
    cases: Option<usize>,
    /// What to attack with
    #[arg(long, value_delimiter = ',', value_enum, default_values_t = AttackName::ALL)]
    attacks: Vec<AttackName>,
    /// The attacks' settings as a TOML file, in place of a preset
    #[arg(long, conflicts_with = "preset")]
    settings: Option<PathBuf>,
    /// How much the attacks cost
    #[arg(long, value_enum, default_value = "reduced")]
    preset: assembly::PresetName,
    /// Print the attacks' settings as TOML and end
    #[arg(long)]
    print_settings: bool,
    #[command(flatten)]
    utility: UtilityFiles,
    #[command(flatten)]
    helpers: Helpers,
    /// Prompts found elsewhere, to be asked too: HarmBench's JSON of test cases
    #[arg(long)]
    replay: Option<PathBuf>,
    /// Folders of other evaluations that the report shows beside this one
    #[arg(long = "with", value_delimiter = ',')]
    others: Vec<PathBuf>,
    /// Try again what failed
    #[arg(long)]
    retry: bool,
    /// auto, cpu, cuda or cuda:N
    #[arg(long, default_value = "auto")]
    device: String,
    /// auto, float32, bfloat16, float16
    #[arg(long, default_value = "auto")]
    dtype: String,
    /// Where records and report go; an evaluation that was stopped there goes on
    #[arg(long)]
    out: Option<PathBuf>,
}

/// One model to evaluate.
struct Candidate {
    name: String,
    model: PathBuf,
    adapter: Option<PathBuf>,
    out: PathBuf,
}

fn main() {
    job::ended(|| evaluate(&Arguments::parse()));
}

fn evaluate(arguments: &Arguments) -> Result<Finish> {
    let settings = settings(arguments)?;
    if arguments.print_settings {
        print!("{}", settings.to_toml()?);
        return Ok(Finish::Completed);
    }
    let Some(model) = &arguments.model else { return evaluate_toy(arguments, &settings) };
    let name = arguments.name.clone().unwrap_or_else(|| support::inputs::folder_name(model));
    let out = arguments.out.clone().unwrap_or_else(|| Path::new("runs").join(format!("evaluation-{name}")));
    let (Some(behaviors), Some(targets)) = (&arguments.behaviors, &arguments.targets) else {
        bail!("--model needs --behaviors and --targets");
    };
    let cases = cases(behaviors, targets, arguments)?;
    let candidate = Candidate { name, model: model.clone(), adapter: arguments.adapter.clone(), out: out.clone() };
    let utility = arguments.utility.clone();
    let Some(evaluation) = one(arguments, &settings, &candidate, &cases, &utility)? else { return Ok(stopped(&out)) };
    let others = arguments.others.iter().map(Evaluation::read).collect::<advtrain::Result<Vec<_>>>()?;
    report(others.into_iter().chain([evaluation]).collect(), &out)
}

/// The toy of `advipo_gemma` before and after, which is hardened first if that has not been done.
fn evaluate_toy(arguments: &Arguments, settings: &EvaluationSettings) -> Result<Finish> {
    let training = TrainingArguments::parse_from(["advipo_gemma"]);
    let plan = job::Plan { name: "advipo_gemma", algorithm: advtrain::Algorithm::AdvIpo, toy: toy::advipo_settings };
    let hardened = job::out_folder(&training, &plan);
    let adapter = hardened.join("adapter");
    if !adapter.join("adapter_model.safetensors").exists() {
        eprintln!("hardening the toy first, as the example advipo_gemma does");
        if job::run(training, plan)? == Finish::Stopped {
            return Ok(Finish::Stopped);
        }
    }
    let out = arguments.out.clone().unwrap_or_else(|| PathBuf::from("runs/evaluation"));
    let toy = hardened.join("toy");
    let Some((model, _)) = toy::prepare(&toy, toy::Size::FULL, 0, &STOP)? else { return Ok(Finish::Stopped) };
    let [behaviors, targets, chats] = toy::held_out(&toy);
    let cases = spread(cases(&behaviors, &targets, arguments)?, 8);
    let utility = UtilityFiles { chats: Some(chats), ..arguments.utility.clone() };
    let mut evaluations = Vec::new();
    for (name, adapter) in [("before", None), ("after", Some(adapter))] {
        let candidate = Candidate { name: name.into(), model: model.clone(), adapter, out: out.join(name) };
        let Some(evaluation) = one(arguments, settings, &candidate, &cases, &utility)? else {
            return Ok(stopped(&out));
        };
        evaluations.push(evaluation);
    }
    report(evaluations, &out)
}

fn settings(arguments: &Arguments) -> Result<EvaluationSettings> {
    match &arguments.settings {
        Some(path) => Ok(EvaluationSettings::read(path)?),
        None => Ok(EvaluationSettings::preset(EvaluationPreset::from(arguments.preset), &ThreatModel::default())),
    }
}

/// Behaviours with their first targets; those whose harm is decided by comparing hashes are left out.
fn cases(behaviors: &Path, targets: &Path, arguments: &Arguments) -> Result<Vec<Case>> {
    let targets = load_targets(targets)?;
    let wanted = arguments.category.as_deref();
    let mut cases = Vec::new();
    let mut left_out = HashSet::new();
    for behavior in load_behaviors(behaviors)? {
        if wanted.is_some() && behavior.functional_category.as_deref() != wanted {
            continue;
        }
        let target = targets.iter().find(|(id, _)| *id == behavior.id).and_then(|(_, list)| list.first());
        match target.filter(|_| !behavior.is_hash_check()) {
            Some(target) => cases.push(Case::new(&behavior, target)),
            None => drop(left_out.insert(behavior.id)),
        }
    }
    if !left_out.is_empty() {
        eprintln!("{} behaviours left out: of copyrighted text, or without a target", left_out.len());
    }
    if cases.is_empty() {
        bail!("{}: no behaviour is left to attack (--category {wanted:?})", behaviors.display());
    }
    let most = arguments.cases.unwrap_or(cases.len());
    Ok(spread(cases, most))
}

/// Evaluates one model. `None` if it was stopped.
fn one(
    arguments: &Arguments,
    settings: &EvaluationSettings,
    candidate: &Candidate,
    cases: &[Case],
    utility: &UtilityFiles,
) -> Result<Option<Evaluation>> {
    let device = device(&arguments.device)?;
    let kind = arguments.dtype.parse::<Dtype>()?.on(device);
    let mut decoder = Decoder::load(&candidate.model, kind, device)?;
    if let Some(adapter) = &candidate.adapter {
        decoder.load_lora(adapter)?;
    }
    let format = ChatFormat::load(&candidate.model)?;
    let frozen = advtrain::CausalLm::frozen(&decoder, false)?;
    let model = frozen.as_deref().unwrap_or(&decoder);
    let end_ids = format.end_ids();
    let generation = Generation { max_new_tokens: settings.max_new_tokens, end_ids, sampling: None };
    let subject = Subject::new(model, &format, generation, settings.rows)?.with_context(decoder.config().max_positions);
    let mut evaluation = Evaluation::open(
        &candidate.out,
        Setup::of_model(&candidate.name, &decoder, candidate.adapter.as_deref(), &subject)?,
    )?;
    if arguments.retry {
        evaluation.forget_failed()?;
    }
    let mut watch = watching::Bar::new(&candidate.name, &STOP)?;
    for name in &arguments.attacks {
        for mut attack in assembly::attacks(*name, settings, &arguments.helpers, &subject)? {
            if evaluation.attack(&mut *attack, &subject, cases, &mut |at| watch.see(at))?.is_break() {
                return Ok(None);
            }
        }
    }
    if let Some(path) = &arguments.replay {
        let name = format!("replay {}", support::inputs::folder_name(path));
        let mut replay = advtrain::Replay::new(name, advtrain::load_test_cases(path)?);
        if evaluation.attack(&mut replay, &subject, cases, &mut |at| watch.see(at))?.is_break() {
            return Ok(None);
        }
    }
    for mut judge in assembly::judges(&arguments.helpers)? {
        if evaluation.judge(&mut *judge, &mut |at| watch.see(at))?.is_break() {
            return Ok(None);
        }
    }
    for mut task in assembly::tasks(utility, &format)? {
        if evaluation.measure(&mut *task, &subject, &mut |at| watch.see(at))?.is_break() {
            return Ok(None);
        }
    }
    watch.finish();
    Ok(Some(evaluation))
}

fn report(evaluations: Vec<Evaluation>, out: &Path) -> Result<Finish> {
    let report = Report::new(&evaluations);
    report.write(out, &evaluations).with_context(|| format!("writing the report into {}", out.display()))?;
    println!("{}", report.table());
    println!("report: {} and report.json beside it", out.join("report.html").display());
    Ok(Finish::Completed)
}

fn stopped(out: &Path) -> Finish {
    println!("stopped; the same command goes on from what is in {}", out.display());
    Finish::Stopped
}
