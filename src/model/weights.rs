//! Tensors in safetensors files, read one by one from a memory map, and written.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::File,
    path::{Path, PathBuf},
};

use memmap2::Mmap;
use rand_distr::{Distribution, Normal};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::{Device, Kind, Tensor};

use crate::{Error, Parameter, Result, digest::generator};

const SINGLE: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";

/// Where a model's weights come from. Each is asked for once, by its Hugging Face name.
pub(super) trait WeightSource {
    /// The tensor of that name, which must have that shape, in float32 or its own dtype, on the CPU.
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor>;
}

/// One safetensors file, mapped.
#[derive(Debug)]
struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

/// The weights of a model folder: `model.safetensors`, or shards with their index.
#[derive(Debug)]
pub(super) struct FolderWeights {
    files: Vec<MappedFile>,
    /// Which file holds a tensor.
    file_of: BTreeMap<String, usize>,
    taken: BTreeSet<String>,
    folder: PathBuf,
}

impl FolderWeights {
    /// Maps the files of a folder and reads their headers.
    pub(super) fn open(folder: &Path) -> Result<Self> {
        let (single, index) = (folder.join(SINGLE), folder.join(INDEX));
        match (single.exists(), index.exists()) {
            (true, _) => Self::of_file(folder, single),
            (false, true) => Self::of_index(folder, &index),
            (false, false) => Err(no_weights(folder)),
        }
    }

    /// Whether the files hold a tensor of that name.
    pub(super) fn has(&self, name: &str) -> bool {
        self.file_of.contains_key(name)
    }

    /// An error about what the files hold.
    pub(super) fn refused(&self, message: impl Into<String>) -> Error {
        Error::file(&self.folder, message)
    }

    /// The same for one file of any name.
    pub(super) fn of_file(folder: &Path, path: PathBuf) -> Result<Self> {
        let file = MappedFile::open(path)?;
        let file_of = file.parse()?.names().into_iter().map(|name| (name.to_string(), 0)).collect();
        Ok(Self { files: vec![file], file_of, taken: BTreeSet::new(), folder: folder.to_path_buf() })
    }

    /// Every tensor from the shard that the index names for it, whatever else the shards hold.
    fn of_index(folder: &Path, index: &Path) -> Result<Self> {
        let weight_map = read_index(index)?;
        let mut files = Vec::new();
        let mut file_of = BTreeMap::new();
        for shard in weight_map.values().collect::<BTreeSet<_>>() {
            let file = MappedFile::open(folder.join(shard))?;
            let names: BTreeSet<_> = file.parse()?.names().into_iter().map(str::to_string).collect();
            for (tensor, _) in weight_map.iter().filter(|(_, of_tensor)| *of_tensor == shard) {
                if !names.contains(tensor) {
                    return Err(Error::file(index, format!("weight_map.{tensor}: {shard:?} has no such tensor")));
                }
                file_of.insert(tensor.clone(), files.len());
            }
            files.push(file);
        }
        Ok(Self { files, file_of, taken: BTreeSet::new(), folder: folder.to_path_buf() })
    }

    /// An error if the files hold a tensor that nobody asked for, unless `expected` accepts its name.
    pub(super) fn finish(self, expected: impl Fn(&str) -> bool) -> Result<()> {
        let left: Vec<_> = self.file_of.keys().filter(|name| !self.taken.contains(*name) && !expected(name)).collect();
        match left.first() {
            None => Ok(()),
            Some(first) => {
                let message =
                    format!("{} tensors that the config has no place for, the first is {first:?}", left.len());
                Err(Error::file(self.folder, message))
            }
        }
    }
}

/// Names the weights of another form that a folder has in place of what is read.
fn no_weights(folder: &Path) -> Error {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let name = |entry: std::fs::DirEntry| entry.file_name().to_string_lossy().into_owned();
    let weights =
        |name: &String| [".safetensors", ".bin", ".pt", ".pth", ".gguf"].iter().any(|end| name.ends_with(end));
    let mut found: Vec<String> = entries.map(name).filter(weights).collect();
    found.sort();
    let found = if found.is_empty() { "no file of weights".to_string() } else { found.join(", ") };
    Error::file(folder, format!("expected {SINGLE}, or {INDEX} with the shards that it names; found {found}"))
}

impl WeightSource for FolderWeights {
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let Some(file) = self.file_of.get(name).map(|index| &self.files[*index]) else {
            return Err(Error::file(
                &self.folder,
                format!("tensor {name:?} of shape {shape:?} is missing from the weights"),
            ));
        };
        self.taken.insert(name.to_string());
        let tensors = file.parse()?;
        let view =
            tensors.tensor(name).map_err(|error| Error::file(&file.path, format!("tensor {name:?}: {error}")))?;
        let found: Vec<i64> = view.shape().iter().map(|len| *len as i64).collect();
        if found != shape {
            return Err(Error::file(&file.path, format!("tensor {name:?}: expected shape {shape:?}, found {found:?}")));
        }
        let Some(kind) = kind_of(view.dtype()) else {
            let message =
                format!("tensor {name:?}: dtype {:?} is not supported: F64, F32, BF16, F16 and I64 are", view.dtype());
            return Err(Error::file(&file.path, message));
        };
        Ok(Tensor::f_from_data_size(view.data(), &found, kind)?)
    }
}

impl MappedFile {
    fn open(path: PathBuf) -> Result<Self> {
        let file = File::open(&path).map_err(|error| Error::io(&path, error))?;
        // SAFETY: the map is read only and lives as long as the loading. A file that another process changes meanwhile gives
        // wrong numbers, and one that it cuts short ends this process with SIGBUS; loading in the docs asks for neither.
        let map = unsafe { Mmap::map(&file) }.map_err(|error| Error::io(&path, error))?;
        Ok(Self { path, map })
    }

    fn parse(&self) -> Result<SafeTensors<'_>> {
        SafeTensors::deserialize(&self.map)
            .map_err(|error| Error::file(&self.path, format!("not a whole safetensors file: {error}")))
    }
}

/// The shard of each tensor.
fn read_index(index: &Path) -> Result<BTreeMap<String, String>> {
    let json: serde_json::Value = crate::files::read_json(index)?;
    let Some(map) = json.get("weight_map").and_then(|map| map.as_object()) else {
        return Err(Error::file(index, "weight_map: expected an object from tensor names to file names"));
    };
    let shard = |(tensor, name): (&String, &serde_json::Value)| match name.as_str() {
        // A path could lead out of the folder.
        Some(file) if !file.is_empty() && file != ".." && !file.contains(['/', '\\']) => {
            Ok((tensor.clone(), file.to_string()))
        }
        _ => Err(Error::file(
            index,
            format!("weight_map.{tensor}: expected the name of a file of this folder, found {name}"),
        )),
    };
    map.iter().map(shard).collect()
}

fn kind_of(dtype: Dtype) -> Option<Kind> {
    Some(match dtype {
        Dtype::F64 => Kind::Double,
        Dtype::F32 => Kind::Float,
        Dtype::BF16 => Kind::BFloat16,
        Dtype::F16 => Kind::Half,
        Dtype::I64 => Kind::Int64,
        _ => return None,
    })
}

fn dtype_of(kind: Kind) -> Option<Dtype> {
    Some(match kind {
        Kind::Double => Dtype::F64,
        Kind::Float => Dtype::F32,
        Kind::BFloat16 => Dtype::BF16,
        Kind::Half => Dtype::F16,
        Kind::Int64 => Dtype::I64,
        _ => return None,
    })
}

/// Reads all tensors of a safetensors file onto a device.
pub(crate) fn read_tensors(path: &Path, device: Device) -> Result<BTreeMap<String, Tensor>> {
    let file = MappedFile::open(path.to_path_buf())?;
    let mut tensors = BTreeMap::new();
    for (name, view) in file.parse()?.tensors() {
        let Some(kind) = kind_of(view.dtype()) else {
            return Err(Error::file(path, format!("tensor {name:?}: dtype {:?} is not supported", view.dtype())));
        };
        let shape: Vec<i64> = view.shape().iter().map(|len| *len as i64).collect();
        tensors.insert(name, Tensor::f_from_data_size(view.data(), &shape, kind)?.f_to_device(device)?);
    }
    Ok(tensors)
}

/// Writes tensors as a safetensors file, beside its place first and then renamed into it.
pub(crate) fn write_tensors(path: &Path, tensors: &[(String, Tensor)]) -> Result<()> {
    let mut buffers = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        buffers.push((name, bytes(tensor)?));
    }
    let views = (buffers.iter())
        .map(|(name, (dtype, shape, data))| match TensorView::new(*dtype, shape.clone(), data) {
            Ok(view) => Ok((name.as_str(), view)),
            Err(error) => Err(Error::file(path, format!("tensor {name:?}: {error}"))),
        })
        .collect::<Result<Vec<_>>>()?;
    // transformers refuses a file that does not say which framework it is for.
    let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
    let data = safetensors::serialize(views, Some(metadata)).map_err(|error| Error::file(path, error.to_string()))?;
    crate::files::write(path, &data)
}

/// Writes tensors as `model.safetensors`, or as shards of at most so many bytes with their index where they are too large
/// for one file. `change` makes of each what is written in its place, of the same shape and dtype: when its file is, so that
/// what was made for one file is in memory at a time.
pub(super) fn write_shards(
    folder: &Path,
    parameters: Vec<Parameter>,
    largest: usize,
    change: impl Fn(&Parameter) -> Result<Tensor>,
) -> Result<()> {
    let mut shards: Vec<Vec<Parameter>> = vec![Vec::new()];
    let (mut total, mut in_last) = (0, 0);
    for parameter in parameters {
        let bytes = parameter.tensor.numel() * parameter.tensor.kind().elt_size_in_bytes();
        if in_last > 0 && in_last + bytes > largest {
            shards.push(Vec::new());
            in_last = 0;
        }
        total += bytes;
        in_last += bytes;
        if let Some(last) = shards.last_mut() {
            last.push(parameter);
        }
    }
    let write = |file: &Path, parameters: &[Parameter]| {
        let changed = parameters.iter().map(|one| Ok((one.name.clone(), change(one)?)));
        let tensors = changed.collect::<Result<Vec<_>>>()?;
        write_tensors(file, &tensors)
    };
    let (single, path) = (folder.join(SINGLE), folder.join(INDEX));
    if let [only] = shards.as_slice() {
        write(&single, only)?;
        crate::files::remove(&path)?;
        return remove_shards_of_another_number(folder, 0);
    }
    let mut weight_map = serde_json::Map::new();
    for (index, parameters) in shards.iter().enumerate() {
        let file = format!("model-{:05}-of-{:05}.safetensors", index + 1, shards.len());
        write(&folder.join(&file), parameters)?;
        weight_map.extend(parameters.iter().map(|one| (one.name.clone(), file.clone().into())));
    }
    let index = serde_json::json!({ "metadata": { "total_size": total }, "weight_map": weight_map });
    crate::files::write_json(&path, &index)?;
    // An older model's file would be read instead of the shards.
    crate::files::remove(&single)?;
    remove_shards_of_another_number(folder, shards.len())
}

/// Removes what an older model left: shards `model-i-of-n.safetensors` whose n is not `shards`.
fn remove_shards_of_another_number(folder: &Path, shards: usize) -> Result<()> {
    let at = |error| Error::io(folder, error);
    for entry in std::fs::read_dir(folder).map_err(at)? {
        let entry = entry.map_err(at)?;
        if shard_count(&entry.file_name().to_string_lossy()).is_some_and(|count| count != shards) {
            crate::files::remove(&entry.path())?;
        }
    }
    Ok(())
}

/// The n of a file name `model-i-of-n.safetensors`.
fn shard_count(name: &str) -> Option<usize> {
    let (index, count) = name.strip_prefix("model-")?.strip_suffix(".safetensors")?.split_once("-of-")?;
    index.parse::<usize>().ok()?;
    count.parse().ok()
}

fn bytes(tensor: &Tensor) -> Result<(Dtype, Vec<usize>, Vec<u8>)> {
    let Some(dtype) = dtype_of(tensor.kind()) else {
        return Err(Error::mismatch(
            "dtype of a tensor to write",
            "a floating one or int64",
            format!("{:?}", tensor.kind()),
        ));
    };
    let shape = tensor.size().iter().map(|len| *len as usize).collect();
    let flat = tensor.f_detach()?.f_to_device(Device::Cpu)?.f_contiguous()?.f_reshape([-1])?;
    let flat = flat.f_view_dtype(Kind::Uint8)?;
    let mut data = vec![0u8; flat.numel()];
    flat.f_copy_data_u8(&mut data, flat.numel())?;
    Ok((dtype, shape, data))
}

/// Fresh weights: matrices drawn from a normal distribution, biases zero, norms so that they do nothing. The draws of a
/// tensor come from the seed and its name.
#[derive(Debug)]
pub(super) struct RandomWeights {
    pub(super) seed: u64,
    pub(super) deviation: f32,
    /// What a norm's weight is where it does nothing.
    pub(super) norm: f64,
}

impl WeightSource for RandomWeights {
    fn get(&mut self, name: &str, shape: &[i64]) -> Result<Tensor> {
        let options = (Kind::Float, Device::Cpu);
        if name.ends_with(".bias") {
            return Ok(Tensor::f_zeros(shape, options)?);
        }
        if name.ends_with("norm.weight") {
            return Ok(Tensor::f_full(shape, self.norm, options)?);
        }
        let normal = Normal::new(0.0, self.deviation)
            .map_err(|_| Error::setting("deviation of random weights", self.deviation, "a finite number"))?;
        let mut random = generator(self.seed, "weights", name);
        let values: Vec<f32> = normal.sample_iter(&mut random).take(shape.iter().product::<i64>() as usize).collect();
        Ok(Tensor::f_from_slice(&values)?.f_view(shape)?)
    }
}
