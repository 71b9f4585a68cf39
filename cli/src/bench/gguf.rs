//! Writes GGUF files, tensor by tensor and row by row, so that a model need not fit into memory.
//!
//! Owns the file format and the element types in use. Own code, because the crates that write GGUF are part of a runtime or
//! keep whole tensors. Must not know what a model consists of.

use std::io::{self, Write};

use half::f16;

const VERSION: u32 = 3;
/// The data section and each tensor in it begin at a multiple of this, the format's default.
const ALIGNMENT: u64 = 32;
/// Elements of a quantised block.
const BLOCK: usize = 32;

/// A value of the metadata.
pub enum Value {
    /// An unsigned number.
    U32(u32),
    /// A number with fraction.
    F32(f32),
    /// A text.
    Text(&'static str),
}

/// How elements are stored; the numbers are ggml's.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// 32 bits.
    F32 = 0,
    /// 16 bits.
    F16 = 1,
    /// 4 bits, and a scale in f16 for 32 elements.
    Q4_0 = 2,
}

impl Kind {
    /// Bytes of whole blocks of elements.
    fn bytes(self, elements: u64) -> u64 {
        match self {
            Kind::F32 => 4 * elements,
            Kind::F16 => 2 * elements,
            Kind::Q4_0 => elements / BLOCK as u64 * (2 + BLOCK as u64 / 2),
        }
    }

    fn encode(self, row: &[f32], out: &mut Vec<u8>) {
        match self {
            Kind::F32 => row.iter().for_each(|x| out.extend(x.to_le_bytes())),
            Kind::F16 => row.iter().for_each(|x| out.extend(f16::from_f32(*x).to_le_bytes())),
            Kind::Q4_0 => row.chunks_exact(BLOCK).for_each(|block| q4_0(block, out)),
        }
    }
}

/// As ggml does it: the element of largest magnitude gets the code 0, which is -8 steps. The first half of a block has the lower
/// four bits of the bytes.
fn q4_0(block: &[f32], out: &mut Vec<u8>) {
    let extreme = block.iter().fold(0.0f32, |a, x| if x.abs() > a.abs() { *x } else { a });
    let step = extreme / -8.0;
    let inverse = if step == 0.0 { 0.0 } else { 1.0 / step };
    let code = |x: f32| ((x * inverse + 8.5) as u8).min(15);
    out.extend(f16::from_f32(step).to_le_bytes());
    let (low, high) = block.split_at(BLOCK / 2);
    out.extend(low.iter().zip(high).map(|(l, h)| code(*l) | code(*h) << 4));
}

/// A matrix, or a vector as a matrix of one row.
pub struct Tensor {
    /// Name that llama.cpp knows it by.
    pub name: String,
    /// Elements of a row: of quantised tensors a multiple of 32.
    pub columns: usize,
    /// Rows.
    pub rows: usize,
    /// How it is stored.
    pub kind: Kind,
}

impl Tensor {
    fn bytes(&self) -> u64 {
        self.kind.bytes((self.columns * self.rows) as u64)
    }
}

fn text(out: &mut Vec<u8>, s: &str) {
    out.extend((s.len() as u64).to_le_bytes());
    out.extend(s.as_bytes());
}

fn pad(out: &mut Vec<u8>, written: u64) {
    out.resize(out.len() + (written.next_multiple_of(ALIGNMENT) - written) as usize, 0);
}

fn head(metadata: &[(&str, Value)], tensors: &[Tensor]) -> Vec<u8> {
    let mut out = b"GGUF".to_vec();
    out.extend(VERSION.to_le_bytes());
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        text(&mut out, key);
        match value {
            Value::U32(x) => out.extend([4, *x].map(u32::to_le_bytes).concat()),
            Value::F32(x) => out.extend([6u32.to_le_bytes(), x.to_le_bytes()].concat()),
            Value::Text(x) => {
                out.extend(8u32.to_le_bytes());
                text(&mut out, x);
            }
        }
    }
    let mut offset = 0u64;
    for t in tensors {
        text(&mut out, &t.name);
        let shape = if t.rows == 1 { vec![t.columns] } else { vec![t.columns, t.rows] };
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|n| out.extend((*n as u64).to_le_bytes()));
        out.extend((t.kind as u32).to_le_bytes());
        out.extend(offset.to_le_bytes());
        offset += t.bytes().next_multiple_of(ALIGNMENT);
    }
    let written = out.len() as u64;
    pad(&mut out, written);
    out
}

/// Writes a file; `fill` is called for the rows of all tensors, in their order.
pub fn write(out: &mut impl Write, metadata: &[(&str, Value)], tensors: &[Tensor], mut fill: impl FnMut(&Tensor, &mut [f32])) -> io::Result<()> {
    out.write_all(&head(metadata, tensors))?;
    let mut bytes = vec![];
    for t in tensors {
        let mut row = vec![0.0; t.columns];
        for _ in 0..t.rows {
            fill(t, &mut row);
            bytes.clear();
            t.kind.encode(&row, &mut bytes);
            out.write_all(&bytes)?;
        }
        bytes.clear();
        pad(&mut bytes, t.bytes());
        out.write_all(&bytes)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;

    /// Reads what the format's specification says, not what the writer does.
    struct Reader<'a>(&'a [u8]);

    impl Reader<'_> {
        fn take<const N: usize>(&mut self) -> [u8; N] {
            let (taken, rest) = self.0.split_at(N);
            self.0 = rest;
            taken.try_into().unwrap()
        }
        fn u32(&mut self) -> u32 {
            u32::from_le_bytes(self.take())
        }
        fn u64(&mut self) -> u64 {
            u64::from_le_bytes(self.take())
        }
        fn text(&mut self) -> String {
            let n = self.u64() as usize;
            let (taken, rest) = self.0.split_at(n);
            self.0 = rest;
            String::from_utf8(taken.to_vec()).unwrap()
        }
    }

    #[test]
    fn a_file_reads_back() {
        let metadata = [("general.architecture", Value::Text("llama")), ("a.count", Value::U32(70_000)), ("a.base", Value::F32(500_000.0))];
        let tensor = |name: &str, columns, rows, kind| Tensor { name: name.into(), columns, rows, kind };
        // 12 and 54 bytes are no multiples of the alignment.
        let tensors = [tensor("norm", 3, 1, Kind::F32), tensor("q", 32, 3, Kind::Q4_0), tensor("embd", 5, 2, Kind::F16)];
        let mut file = vec![];
        let mut next = 0.0;
        let fill = |_: &Tensor, row: &mut [f32]| {
            row.iter_mut().for_each(|x| {
                next += 1.0;
                *x = next;
            });
        };
        write(&mut file, &metadata, &tensors, fill).unwrap();

        let mut r = Reader(&file);
        assert_eq!(&r.take::<4>(), b"GGUF");
        assert_eq!((r.u32(), r.u64(), r.u64()), (3, 3, 3));
        let read: HashMap<String, String> = (0..3)
            .map(|_| {
                let key = r.text();
                let value = match r.u32() {
                    4 => r.u32().to_string(),
                    6 => f32::from_le_bytes(r.take()).to_string(),
                    8 => r.text(),
                    other => panic!("value type {other}"),
                };
                (key, value)
            })
            .collect();
        let want = [("general.architecture", "llama"), ("a.count", "70000"), ("a.base", "500000")];
        assert_eq!(read, want.map(|(k, v)| (k.to_string(), v.to_string())).into());
        let infos: Vec<_> = (0..3)
            .map(|_| {
                let (name, n) = (r.text(), r.u32());
                let shape: Vec<u64> = (0..n).map(|_| r.u64()).collect();
                (name, shape, r.u32(), r.u64() as usize)
            })
            .collect();
        let start = (file.len() - r.0.len()).next_multiple_of(32);
        let [norm, q, embd] = infos.try_into().unwrap();
        assert_eq!(norm, ("norm".into(), vec![3], 0, 0));
        assert_eq!(q, ("q".into(), vec![32, 3], 2, 32));
        assert_eq!(embd, ("embd".into(), vec![5, 2], 1, 96));
        let data = &file[start..];
        assert_eq!(data.len(), 128, "the last tensor is padded too");
        let floats: Vec<f32> = data[..12].chunks(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect();
        assert_eq!(floats, [1.0, 2.0, 3.0]);
        // 35 is the largest of the first block, 99 of the last one.
        for (block, largest) in [(0, 35.0f32), (2, 99.0)] {
            let at = 32 + block * 18;
            assert_eq!(f16::from_le_bytes([data[at], data[at + 1]]), f16::from_f32(largest / -8.0));
        }
        let halves: Vec<f32> = data[96..116].chunks(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect();
        assert_eq!(halves, (100..110).map(|x| x as f32).collect::<Vec<_>>());
    }

    #[test]
    fn q4_0_of_a_known_block() {
        // 0, 1, .. 31 with alternating signs: d = -31/-8 = 3.875, exact in f16; codes floor(x/d + 8.5), at most 15.
        let block: Vec<f32> = (0..32).map(|i| if i % 2 == 0 { i as f32 } else { -(i as f32) }).collect();
        let codes = [8, 8, 9, 7, 9, 7, 10, 6, 10, 6, 11, 5, 11, 5, 12, 4, 12, 4, 13, 3, 13, 3, 14, 2, 14, 2, 15, 1, 15, 1, 15, 0];
        let mut bytes = vec![];
        q4_0(&block, &mut bytes);
        assert_eq!(bytes.len(), 18);
        assert_eq!(f16::from_le_bytes([bytes[0], bytes[1]]).to_f32(), 3.875);
        let read: Vec<u8> = bytes[2..].iter().map(|b| b & 15).chain(bytes[2..].iter().map(|b| b >> 4)).collect();
        assert_eq!(read, codes);
        bytes.clear();
        q4_0(&[0.0; 32], &mut bytes);
        assert_eq!(bytes[2..], [0x88; 16], "zeros are 0 steps");
    }
}
