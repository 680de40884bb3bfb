"""Reading ext2, ext3 and ext4 file systems without mounting them: from any range of bytes, without root."""
