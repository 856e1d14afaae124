"Video files to tensors: the right frames, the same on every run, and one line for every bad input."
import shutil, wave
from fractions import Fraction
from pathlib import Path

import av, numpy as np, pytest, torch
from dera.data import (VideoClips, folder_manifest, frame_indices, loader, probe, read_chunks, read_clip,
                       ucf101_manifest)
from dera.pocket import CLASSES, render, sample_factors, write_dataset, write_video
from dera.utils import InputError

N, FRAMES = 20, 20


@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A folder of pocket clips, their names in order, and the frames they were rendered from."
    root = tmp_path_factory.mktemp('data')/'pocket'
    factors = write_dataset(root, N, seed=8, num_frames=FRAMES)
    names = np.load(root/'factors.npz')['names'].tolist()
    return root, names, render(factors, FRAMES, 64), factors


@pytest.fixture(scope='module')
def flying():
    "A clip whose frames all differ: a star that flies across."
    f = sample_factors(1, seed=1); f.shape[:], f.motion[:], f.speed[:], f.hue[:], f.bg_value[:] = 4, 0, 1.3, .1, .1
    f.x[:], f.y[:] = 0, 0
    return render(f, 60, 64)[0]


def encode(path, video, codec, pix_fmt='yuv420p', **options):
    "Write a clip with any codec."
    with av.open(str(path), 'w') as file:
        stream = file.add_stream(codec, rate=Fraction(24), options={k.replace('_', '-'): v for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = *video.shape[2:], pix_fmt
        for frame in (video*255).byte().permute(1, 2, 3, 0).numpy():
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format='rgb24')))
        file.mux(stream.encode())
    return path


def which(clip, truth):
    "Index of the most similar true frame, for every frame of a clip."
    return (clip[:, :, None] - truth[:, None]).pow(2).mean((0, 3, 4)).argmin(1).tolist()


def one_line(error, *parts):
    message = str(error.value)
    assert '\n' not in message and all(str(p) in message for p in parts), message
    return message


# ---- which frames

def test_indices_stay_inside_and_follow_their_definition():
    for n in range(1, 40):
        for t in (1, 2, 5, 8, 16):
            for sampling in ('native', 'uniform', 'all'):
                k = frame_indices(n, t, sampling, seed=n)
                assert k.shape[1] == t and k.min() >= 0 and k.max() < n and (np.diff(k, axis=1) >= 0).all()
                if n < t: assert k.tolist() == [[min(i, n - 1) for i in range(t)]]
            if n >= t:
                assert (np.diff(frame_indices(n, t, seed=3)) == 1).all()
                chunks = frame_indices(n, t, 'all'); assert chunks.ravel().tolist() == list(range(n//t*t))
                u = frame_indices(n, t, 'uniform')[0]
                if t > 1: assert u[0] == 0 and u[-1] == n - 1 and abs(u - np.linspace(0, n - 1, t)).max() <= .5


def test_seeds_reach_every_start_and_repeat():
    starts = [frame_indices(20, 8, seed=s)[0, 0] for s in range(400)]
    assert set(starts) == set(range(13)) and starts == [frame_indices(20, 8, seed=s)[0, 0] for s in range(400)]
    assert frame_indices(20, 8)[0, 0] == 6 and frame_indices(8, 8, seed=5)[0, 0] == 0
    assert frame_indices(20, 8, seed=-1).tolist() == frame_indices(20, 8, seed=2**64 - 1).tolist()


@pytest.mark.parametrize('backend', ['decord', 'pyav'])
def test_frames_read_are_the_frames_written(tmp_path, flying, backend):
    path = tmp_path/'clip.mp4'; write_video(path, flying)
    assert probe(path).num_frames == 60
    for sampling, seed in ('native', None), ('native', 0), ('native', 1), ('uniform', None):
        clip = read_clip(path, 8, 64, sampling, seed, backend)
        assert which(clip, flying) == frame_indices(60, 8, sampling, seed)[0].tolist()
        assert clip.dtype == torch.float32 and clip.is_contiguous() and 0 <= clip.min() and clip.max() <= 1
    chunks = read_chunks(path, 16, 64, backend)
    assert chunks.shape == (3, 3, 16, 64, 64)
    for c, chunk in enumerate(chunks): assert which(chunk, flying) == list(range(16*c, 16*c + 16))


def test_a_short_file_repeats_its_last_frame(tmp_path, flying):
    path = tmp_path/'short.mp4'; write_video(path, flying[:, :5])
    whole = read_clip(path, 5, 64)
    for sampling, backend in ('native', 'decord'), ('native', 'pyav'), ('uniform', None):
        clip = read_clip(path, 8, 64, sampling, 7, backend)
        assert torch.equal(clip[:, :5], whole) and (clip[:, 5:] == clip[:, 4:5]).all()
    assert torch.equal(read_chunks(path, 8, 64)[0], clip) and probe(path).num_frames == 5
    for cache in (False, True): assert torch.equal(VideoClips([(path, 0)], 8, 64, cache=cache)[0]['video'], clip)
    write_video(tmp_path/'one.mp4', flying[:, :1])
    assert (read_clip(tmp_path/'one.mp4', 4, 64) == read_clip(tmp_path/'one.mp4', 1, 64)).all()


# ---- the two backends

CODECS = {'b.mp4': dict(codec='libx264', bf='3', g='20'), 'open.mkv': dict(codec='libx264', bf='3', g='20', x264_params='open-gop=1'),
          'b.avi': dict(codec='mpeg4', bf='2', g='12', qscale='3'), 'odd.mkv': dict(codec='libx264', pix_fmt='yuv444p')}

@pytest.mark.parametrize('name', CODECS)
def test_decord_and_pyav_agree_on_every_frame(tmp_path, flying, name):
    video = flying[:, :, :51, :63] if name == 'odd.mkv' else flying
    path = encode(tmp_path/name, video, **CODECS[name])
    a, b = (read_clip(path, 60, min(video.shape[2:]), backend=k) for k in ('decord', 'pyav'))
    assert (a - b).abs().max() <= 2/255 + 1e-6
    for seed in range(12):                                      # a window is a window of the whole, wherever it starts
        s = int(frame_indices(60, 4, seed=seed)[0, 0])
        for k in ('decord', 'pyav'):
            assert (read_clip(path, 4, min(video.shape[2:]), seed=seed, backend=k) - b[:, s:s + 4]).abs().max() <= 2/255 + 1e-6


def test_pyav_takes_over_where_decord_cannot(tmp_path, flying, monkeypatch):
    path = encode(tmp_path/'ten.mp4', flying, 'libx264', pix_fmt='yuv420p10le')
    assert probe(path).bits == 10 and torch.equal(read_clip(path, 8, 64), read_clip(path, 8, 64, backend='pyav'))
    with pytest.raises(InputError) as e: read_clip(path, 8, 64, backend='decord')
    one_line(e, path, '10-bit')
    write_video(tmp_path/'plain.mp4', flying)
    monkeypatch.setitem(__import__('sys').modules, 'decord', None)            # as where decord has no wheel
    assert read_clip(tmp_path/'plain.mp4', 8, 64).shape == (3, 8, 64, 64)
    with pytest.raises(InputError) as e: read_clip(tmp_path/'plain.mp4', 8, 64, backend='decord')
    one_line(e, 'decord')


def test_size_is_the_short_side_and_the_centre_is_kept(tmp_path):
    video = torch.zeros(3, 4, 64, 128); video[0, ..., :32] = 1; video[1, ..., 32:96] = 1; video[2, ..., 96:] = 1
    write_video(tmp_path/'wide.mp4', video); write_video(tmp_path/'tall.mp4', video.transpose(2, 3))
    assert (probe(tmp_path/'wide.mp4').height, probe(tmp_path/'wide.mp4').width) == (64, 128)
    for size in (32, 64, 96):
        wide, tall = (read_clip(tmp_path/f'{k}.mp4', 4, size) for k in ('wide', 'tall'))
        assert wide.shape == tall.shape == (3, 4, size, size)
        edge = size//8                                          # red and blue lie outside the centre square
        for clip in (wide[..., edge:-edge], tall[..., edge:-edge, :]):
            assert clip[1].min() > .9 and clip[[0, 2]].max() < .15


def test_spaces_and_other_alphabets_in_a_path(tmp_path, flying):
    folder = tmp_path/'my vidéos 映像'; folder.mkdir(); path = folder/'a clip #1 (x).mp4'; write_video(path, flying[:, :8])
    assert torch.equal(read_clip(path, 8, 64, backend='decord'), read_clip(str(path), 8, 64, backend='pyav'))


# ---- bad files

def test_every_bad_file_is_one_line(tmp_path, flying, capfd):
    (tmp_path/'empty.mp4').touch(); (tmp_path/'folder.mp4').mkdir(); (tmp_path/'text.mp4').write_text('hello\n'*99)
    (tmp_path/'titles.mp4').write_text('1\n00:00:01,000 --> 00:00:02,000\nhello\n\n'*9)
    (tmp_path/'bytes.mp4').write_bytes(np.random.default_rng(0).bytes(5000))
    with wave.open(str(tmp_path/'sound.mp4'), 'wb') as w: w.setparams((1, 2, 8000, 0, 'NONE', '')); w.writeframes(bytes(8000))
    write_video(tmp_path/'whole.mp4', flying); encode(tmp_path/'whole.avi', flying, 'mpeg4')
    for name in ('mp4', 'avi'):
        content = (tmp_path/f'whole.{name}').read_bytes(); (tmp_path/f'half.{name}').write_bytes(content[:len(content)//2])
    (tmp_path/'most.avi').write_bytes(content[:len(content)*2//3])
    content = bytearray((tmp_path/'whole.mp4').read_bytes()); middle = content.index(b'mdat') + 8
    content[middle:middle + 3000] = bytes(3000); (tmp_path/'zeros.mp4').write_bytes(content)
    causes = {'missing.mp4': 'no such file', 'folder.mp4': 'folder', 'empty.mp4': 'empty', 'text.mp4': 'not a video',
              'titles.mp4': 'no pictures', 'bytes.mp4': 'not a video', 'sound.mp4': 'no pictures', 'half.mp4': 'damaged',
              'half.avi': 'damaged', 'most.avi': 'cut short', 'zeros.mp4': 'decode'}
    for name, cause in causes.items():
        for backend in (None, 'decord', 'pyav'):
            with pytest.raises(InputError) as e: read_clip(tmp_path/name, 8, 64, backend=backend)
            assert one_line(e, tmp_path/name).count('cannot read') == 1
            if backend is None: one_line(e, cause)
        if name not in ('zeros.mp4',):
            with pytest.raises(InputError): probe(tmp_path/name)
    out, err = capfd.readouterr()
    assert out == '' and err == '', 'a decoder printed'


def test_a_file_that_loses_frames_at_the_end_fails_or_repeats(tmp_path, flying, monkeypatch):
    path = tmp_path/'clip.mp4'; write_video(path, flying[:, :10])
    import dera.data as data
    true = probe(path)
    monkeypatch.setattr(data, 'probe', lambda p: data.VideoInfo(12, true.height, true.width, true.fps, 8))
    clip, whole = read_clip(path, 12, 64), read_clip(path, 10, 64, 'uniform')
    assert clip.shape[1] == 12 and (clip[:, 10:] == clip[:, 9:10]).all() and torch.equal(clip[:, 9], whole[:, 8])


@pytest.mark.parametrize('change, word', [(dict(num_frames=0), 'num_frames'), (dict(size=0), 'size'), (dict(sampling='every'), 'every'),
                                          (dict(sampling='all'), 'read_chunks'), (dict(backend='opencv'), 'opencv')])
def test_bad_arguments(world, change, word):
    root, names, *_ = world
    with pytest.raises(InputError) as e: read_clip(root/names[0], **{**dict(num_frames=8, size=64), **change})
    one_line(e, word)


# ---- manifests

def test_pocket_splits(world):
    root, names, _, factors = world
    train, classes = ucf101_manifest(root, 'train'); test, _ = ucf101_manifest(root, 'test'); every, _ = ucf101_manifest(root)
    assert classes == CLASSES and len(train) == 16 and len(test) == 4 and sorted(train + test) == sorted(every)
    label = dict(zip(names, factors.label.tolist()))
    assert {str(Path(p).relative_to(root)): l for p, l in every} == label
    assert [str(Path(p).relative_to(root)) for p, _ in train] == [n for i, n in enumerate(names) if i % 5 != 4]
    second = ucf101_manifest(root, 'train', 2)[0]; assert second and {p for p, _ in second} != {p for p, _ in train}


def ucf(root, folder, file, listed, beside=True):
    "One official-looking clip; lists beside UCF-101 (as the archives unpack) or within the class folders' parent."
    videos = root/'UCF-101' if beside else root
    (videos/folder).mkdir(parents=True); (videos/folder/file).write_bytes(b'0'); (root/'ucfTrainTestlist').mkdir()
    (root/'ucfTrainTestlist/classInd.txt').write_text('1 Archery\r\n2 HandstandPushups\r\n')
    (root/'ucfTrainTestlist/trainlist01.txt').write_text(f'{listed} 2\r\n\r\n')
    (root/'ucfTrainTestlist/testlist01.txt').write_text(f'{listed}\r\n')
    return root


@pytest.mark.parametrize('folder, file, listed', [
    ('HandstandPushups', 'v_HandStandPushups_g01_c01.avi', 'HandstandPushups/v_HandStandPushups_g01_c01.avi'),
    ('HandstandPushups', 'v_HandStandPushups_g01_c01.avi', 'HandstandPushups/v_HandstandPushups_g01_c01.avi'),
    ('HandstandPushups', 'v_HandStandPushups_g01_c01.avi', 'HandStandPushups/v_HandStandPushups_g01_c01.avi'),
    ('HandStandPushups', 'v_HandStandPushups_g01_c01.avi', 'HandstandPushups/v_HandstandPushups_g01_c01.avi')])
@pytest.mark.parametrize('beside', [True, False])
def test_handstand_trap(tmp_path, folder, file, listed, beside):
    root = ucf(tmp_path, folder, file, listed, beside)
    for place in ([root, root/'UCF-101'] if beside else [root]):
        for split in ('train', 'test', None):
            assert ucf101_manifest(place, split) == ([(str((root/'UCF-101' if beside else root)/folder/file), 1)], ['Archery', 'HandstandPushups'])


def test_exact_spelling_comes_first(tmp_path):
    root = ucf(tmp_path, 'HandstandPushups', 'v_A.avi', 'HandstandPushups/v_a.avi')
    other = root/'UCF-101/HandstandPushups/v_a.avi'
    other.write_bytes(b'1')
    if other.samefile(root/'UCF-101/HandstandPushups/v_A.avi'): pytest.skip('this file system ignores case')
    assert ucf101_manifest(root, 'train')[0] == [(str(other), 1)]


def test_plain_folders(tmp_path, world):
    root, names, *_ = world
    for place in ('b/x.MP4', 'a/y.mp4', 'a/x.mp4', 'a/.hidden.mp4', 'a/notes.txt'):
        (tmp_path/place).parent.mkdir(exist_ok=True); shutil.copy(root/names[0], tmp_path/place)
    items, classes = folder_manifest(tmp_path)
    assert classes == ['a', 'b'] and [(str(Path(p).relative_to(tmp_path)), l) for p, l in items] == [('a/x.mp4', 0), ('a/y.mp4', 0), ('b/x.MP4', 1)]
    assert ucf101_manifest(tmp_path) == (items, classes) and len(VideoClips(tmp_path, 8, 32)) == 3
    assert folder_manifest(tmp_path/'a')[1] == ['a']


def test_bad_folders_and_lists(tmp_path, world):
    root = world[0]
    def refused(*parts, source, **options):
        with pytest.raises(InputError) as e: VideoClips(source, 8, 32, **options)
        one_line(e, *parts)
    refused(tmp_path/'nowhere', 'no folder', source=tmp_path/'nowhere')
    refused(tmp_path, 'no videos', source=tmp_path)
    refused('valid', 'train or test', source=root, split='valid')
    refused('trainlist04.txt', 'split_id', source=root, split='train', split_id=4)
    refused('sampling', "'all'", source=root, sampling='all')
    copy = tmp_path/'copy'; shutil.copytree(root, copy)
    lost = (copy/'ucfTrainTestlist/testlist01.txt').read_text().split()
    for name in lost[1:]: (copy/name).unlink()
    refused('testlist01.txt', lost[1], 'and 2 more', source=copy, split='test')
    assert len(VideoClips(copy, 8, 32, split='train')) == 16
    (copy/'ucfTrainTestlist/testlist01.txt').write_text('')
    refused('testlist01.txt', 'nothing', source=copy, split='test')
    (copy/'Strange').mkdir(); shutil.copy(copy/lost[0], copy/'Strange/v.mp4')
    refused('Strange', 'classInd.txt', source=copy)
    shutil.rmtree(copy/'ucfTrainTestlist')
    refused('ucfTrainTestlist', source=copy, split='train')
    refused('empty', source=[]); refused("'Archery'", source=[('a.mp4', 'Archery')]); refused('-1', source=[('a.mp4', -1)])
    refused('no split', source=[('a.mp4', 0)], split='train')
    with pytest.raises(InputError) as e: VideoClips([(tmp_path/'gone.mp4', 0)], 8, 32)[0]
    one_line(e, 'gone.mp4')


# ---- the data set

def collect(root, workers, epochs=(0, 1), **options):
    "Everything an epoch yields, for several epochs of one loader."
    clips = VideoClips(root, 8, 32, split='train', seed=3, flip=True, cache=options.pop('cache', False)); out = []
    batches = loader(clips, 4, seed=5, num_workers=workers, **options)
    for epoch in epochs:
        clips.set_epoch(epoch); out.append([(p, int(l), v) for b in batches for p, l, v in zip(b['path'], b['label'], b['video'])])
    return out


def same(a, b): return len(a) == len(b) and all(x[:2] == y[:2] and torch.equal(x[2], y[2]) for x, y in zip(a, b))


def test_workers_caches_and_resumes_see_the_same_clips(world):
    root = world[0]; alone = collect(root, 0)
    assert len(alone[0]) == 16 and len({p for p, *_ in alone[0]}) == 16
    assert [p for p, *_ in alone[0]] != [p for p, *_ in alone[1]]                       # another order
    assert any(not torch.equal(v, dict((p, w) for p, _, w in alone[1])[p]) for p, _, v in alone[0]) # other windows
    assert all(map(same, alone, collect(root, 0, cache=True)))
    assert all(map(same, alone, collect(root, 2, persistent_workers=True)))             # set_epoch reaches running workers
    assert same(alone[1], collect(root, 0, epochs=(1,))[0])                             # resumed at epoch 1


def test_starts_depend_on_seed_epoch_and_index(world):
    root, names, truth, _ = world
    def starts(seed, epoch, flip=False):
        clips = VideoClips([(root/names[0], 0)]*30, 8, 64, seed=seed, flip=flip, cache=True); clips.set_epoch(epoch)
        return [clips[i]['video'] for i in range(30)]
    base = starts(0, 0); distinct = {v.numpy().tobytes() for v in base}
    assert 6 < len(distinct) <= 13                                                      # one file, 13 possible windows
    agree = lambda a, b: sum(torch.equal(x, y) for x, y in zip(a, b))
    assert agree(base, starts(0, 0)) == 30 and agree(base, starts(1, 0)) < 12 and agree(base, starts(0, 1)) < 12
    flipped = starts(0, 0, flip=True)
    kept, mirrored = agree(base, flipped), agree([v.flip(-1) for v in base], flipped)
    assert kept + mirrored >= 30 and min(kept, mirrored) >= 5


def test_entries(world):
    root, names, truth, factors = world
    clips = VideoClips(root, 8, 64, 'uniform')
    assert len(clips) == N and clips.labels == [clips[i]['label'] for i in range(N)] and torch.equal(clips[-1]['video'], clips[N - 1]['video'])
    with pytest.raises(IndexError): clips[N]
    for item in (clips[i] for i in range(N)):
        i = names.index(str(Path(item['path']).relative_to(root)))
        wanted = truth[i][:, frame_indices(FRAMES, 8, 'uniform')[0]]
        assert (item['video'] - wanted).pow(2).mean() < .004 and clips.classes[item['label']] == Path(item['path']).parent.name
    seen = []
    VideoClips(root, 8, 32, cache=True, progress=lambda it, **k: seen.append(k) or it)
    assert len(seen) == 1 and seen[0]['desc']


def test_loader_refuses_what_it_cannot_fill(world):
    clips = VideoClips(world[0], 8, 32, split='test')
    for size in (5, 0):
        with pytest.raises(InputError) as e: loader(clips, size)
        one_line(e, f'batch of {size} ', '4 clips')
    assert [len(b['label']) for b in loader(clips, 3, shuffle=False)] == [3, 1]
    assert [p for b in loader(clips, 3, shuffle=False) for p in b['path']] == clips.paths
